/* A sparse matrix times a dense one, and the two ways in which layers ask for it.
 *
 * The weight is [outputs, inputs], kept as compressed rows: values, and the input each stands for.
 * What it is multiplied with is packed into panels: P columns (tokens or pixels) side by side, so
 * that one weight meets P neighbouring numbers, which are vectors, and sums stay in registers while
 * a row of the weight goes by. Rows of a panel are inputs, or, for a convolution, its taps.
 *
 * Each output is summed up in one order, whatever the number of threads. No library is needed but
 * libc; with OpenMP, panels are spread over threads, or rows where there are few panels. */

#include "panel.h"

typedef struct {
    const int32_t *start;     /* [outputs * groups + 1]: where a row's groups begin */
    const uint16_t *column16; /* of each value; one of the two is NULL */
    const int32_t *column32;
    const float *value;
    const float *bias; /* [outputs] or NULL */
    int64_t outputs, inputs;
    int64_t groups; /* a row is split into so many groups: for a convolution, rows of the kernel */
} Weight;

/* One row of the weight times a panel: P sums. SETS independent sums hide the latency of adding. */
ALWAYS void row_times_panel(const Weight *w, int64_t begin, int64_t end, float bias,
                            const float *panel, int P, int SETS, int wide, float *out)
{
    enum { MOST = 2 * WIDEST / LANES };
    const int V = P / LANES;
    vec sum[MOST];
#pragma GCC unroll 32
    for (int v = 0; v < V * SETS; v++)
        sum[v] = (v < V ? bias : 0.0f) - (vec){0};
    int64_t i = begin;
    for (; i + SETS <= end; i += SETS) {
#pragma GCC unroll 4
        for (int s = 0; s < SETS; s++) {
            const size_t column = wide ? (size_t)w->column32[i + s] : w->column16[i + s];
            const vec *x = (const vec *)(panel + column * P);
            const vec weight = w->value[i + s] - (vec){0};
#pragma GCC unroll 32
            for (int v = 0; v < V; v++)
                sum[s * V + v] += weight * x[v];
        }
    }
    for (; i < end; i++) {
        const size_t column = wide ? (size_t)w->column32[i] : w->column16[i];
        const vec *x = (const vec *)(panel + column * P);
        const vec weight = w->value[i] - (vec){0};
#pragma GCC unroll 32
        for (int v = 0; v < V; v++)
            sum[v] += weight * x[v];
    }
#pragma GCC unroll 32
    for (int v = 0; v < V; v++) {
        vec total = sum[v];
#pragma GCC unroll 4
        for (int s = 1; s < SETS; s++)
            total += sum[s * V + v];
        ((vec *)out)[v] = total;
    }
}

/* Rows [first, last) times a panel, of which groups [low, high) are not all zero. */
ALWAYS void rows_times_panel(const Weight *w, int64_t first, int64_t last, int64_t low,
                             int64_t high, const float *panel, int P, int SETS, int wide,
                             float *out, int64_t pitch)
{
    for (int64_t row = first; row < last; row++) {
        const int32_t *start = w->start + row * w->groups;
        row_times_panel(w, start[low], start[high], w->bias ? w->bias[row] : 0.0f, panel, P, SETS,
                        wide, out + (row - first) * pitch);
    }
}

static void multiply(const Weight *w, int64_t first, int64_t last, int64_t low, int64_t high,
                     const float *panel, int P, float *out, int64_t pitch)
{
#define CASE(p, sets)                                                                              \
    if (P == p && w->column16)                                                                     \
        rows_times_panel(w, first, last, low, high, panel, p, sets, 0, out, pitch);                \
    else if (P == p)                                                                               \
        rows_times_panel(w, first, last, low, high, panel, p, sets, 1, out, pitch);
    CASE(16, 4)
    CASE(32, 2)
    CASE(64, 1)
#undef CASE
}

/* Linear: y[tokens, outputs] = x[tokens, inputs] W^T + b. */

/* Inputs [from, to) of `count` tokens; columns past them are summed up too, so they are zero. */
static void linear_pack(const float *x, int64_t inputs, int64_t from, int64_t to, int64_t count,
                        int P, float *panel)
{
    if (count < P)
        memset(panel + from * P, 0, sizeof(float) * (size_t)((to - from) * P));
    turn(x + from, count, to - from, inputs, panel + from * P, P);
}

/* Outputs [first, last) of `count` tokens. */
static void linear_rows(const Weight *w, const float *panel, int P, int64_t first, int64_t last,
                        int64_t count, float *y)
{
    float tile[TILE * WIDEST] __attribute__((aligned(64)));
    for (int64_t row = first; row < last; row += TILE) {
        const int64_t rows = smaller(last - row, TILE);
        for (int64_t r = 0; r < rows; r++) {
            /* What the next tile is written to is on its way while this one is made. */
            for (int64_t token = r; token < count; token += TILE)
                __builtin_prefetch(y + token * w->outputs + row + TILE, 1);
            multiply(w, row + r, row + r + 1, 0, w->groups, panel, P, tile + r * P, P);
        }
        turn(tile, rows, count, P, y + row, w->outputs);
    }
}

static int linear(const Weight *w, const float *x, int64_t tokens, float *y, int threads)
{
    const int64_t panels = (tokens + WIDEST - 1) / WIDEST;
    int failed = 0;
    if (panels >= threads) {
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
        {
            float *panel = scratch(w->inputs * WIDEST);
            failed |= !panel;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < panels; i++) {
                const int64_t from = i * WIDEST;
                const int64_t count = smaller(tokens - from, WIDEST);
                const int P = panel_width(count);
                if (panel) {
                    linear_pack(x + from * w->inputs, w->inputs, 0, w->inputs, count, P, panel);
                    linear_rows(w, panel, P, 0, w->outputs, count, y + from * w->outputs);
                }
            }
            free(panel);
        }
        return failed;
    }
    float *panel = scratch(w->inputs * WIDEST);
    if (!panel)
        return 1;
    const int64_t in_tiles = (w->inputs + TILE - 1) / TILE;
    const int64_t out_tiles = (w->outputs + TILE - 1) / TILE;
    for (int64_t i = 0; i < panels; i++) {
        const int64_t from = i * WIDEST;
        const int64_t count = smaller(tokens - from, WIDEST);
        const int P = panel_width(count);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < in_tiles; t++) {
                const int64_t last = smaller((t + 1) * TILE, w->inputs);
                linear_pack(x + from * w->inputs, w->inputs, t * TILE, last, count, P, panel);
            }
#pragma omp for schedule(static)
            for (int64_t t = 0; t < out_tiles; t++) {
                const int64_t last = smaller((t + 1) * TILE, w->outputs);
                linear_rows(w, panel, P, t * TILE, last, count, y + from * w->outputs);
            }
        }
    }
    free(panel);
    return 0;
}

/* Convolution of images [count, channels, height, width] to [count, outputs, high, wide]. */

typedef struct {
    int64_t count, channels, height, width, high, wide;
    int64_t kernel[2], stride[2], padding[2], dilation[2];
} Shape;

/* The quotient rounded up, for any a and positive b. */
ALWAYS int64_t quotient_up(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

/* Pixels side by side that one tap reads side by side: to[at + i] = in[from + i * stride]. */
typedef struct {
    int64_t at, from, count;
} Run;

/* What a tap reads for pixels [from, from + count) of one image's output, in runs; the rest is
 * padding. Returns how many runs there are, at most one for each row of the output. */
static int tap_runs(const Shape *s, int64_t ky, int64_t kx, int64_t from, int64_t count, Run *runs)
{
    const int64_t dx = kx * s->dilation[1] - s->padding[1];
    const int64_t left = larger(quotient_up(-dx, s->stride[1]), 0);
    const int64_t right = smaller(quotient_up(s->width - dx, s->stride[1]), s->wide);
    int found = 0;
    for (int64_t done = 0; done < count;) {
        const int64_t y = (from + done) / s->wide, x = (from + done) % s->wide;
        const int64_t end = smaller(s->wide, x + count - done);
        const int64_t in_y = y * s->stride[0] + ky * s->dilation[0] - s->padding[0];
        const int64_t first = larger(left, x), last = smaller(right, end);
        if (in_y >= 0 && in_y < s->height && first < last)
            runs[found++] = (Run){done + first - x, in_y * s->width + first * s->stride[1] + dx,
                                  last - first};
        done += end - x;
    }
    return found;
}

ALWAYS void copy(const float *in, int64_t stride, int64_t count, float *to)
{
    int64_t i = 0;
    if (stride == 1 && count >= LANES) {
        for (; i + LANES < count; i += LANES)
            *(vec *)(to + i) = *(const vec *)(in + i);
        i = count - LANES; /* what is left, and some of it again */
        *(vec *)(to + i) = *(const vec *)(in + i);
        return;
    }
    for (; i < count; i++)
        to[i] = in[i * stride];
}

/* Rows [low, high) of the kernel that read more than padding for these pixels. */
static void live_groups(const Shape *s, int64_t from, int64_t count, int64_t *low, int64_t *high)
{
    const int64_t top = from / s->wide * s->stride[0] - s->padding[0];
    const int64_t bottom = (from + count - 1) / s->wide * s->stride[0] - s->padding[0];
    *low = smaller(larger(quotient_up(-bottom, s->dilation[0]), 0), s->kernel[0]);
    *high = smaller(larger(quotient_up(s->height - top, s->dilation[0]), *low), s->kernel[0]);
}

/* The rows of the panel for one tap and channels [first, last). */
static void conv_pack(const Shape *s, const float *image, int64_t tap, int64_t first, int64_t last,
                      int64_t from, int64_t count, int P, float *panel)
{
    Run runs[WIDEST];
    const int found = tap_runs(s, tap / s->kernel[1], tap % s->kernel[1], from, count, runs);
    int64_t covered = 0;
    for (int i = 0; i < found; i++)
        covered += runs[i].count;
    for (int64_t channel = first; channel < last; channel++) {
        const float *plane = image + channel * s->height * s->width;
        float *to = panel + (tap * s->channels + channel) * P;
        if (covered < P)
            memset(to, 0, sizeof(float) * (size_t)P);
        for (int i = 0; i < found; i++)
            copy(plane + runs[i].from, s->stride[1], runs[i].count, to + runs[i].at);
    }
}

/* Outputs [first, last) of pixels [from, from + count) of one image. */
static void conv_rows(const Weight *w, const Shape *s, const float *panel, int P, int64_t first,
                      int64_t last, int64_t from, int64_t count, float *y)
{
    const int64_t pixels = s->high * s->wide;
    int64_t low, high;
    live_groups(s, from, count, &low, &high);
    if (count == P) {
        multiply(w, first, last, low, high, panel, P, y + first * pixels + from, pixels);
        return;
    }
    float sums[WIDEST] __attribute__((aligned(64)));
    for (int64_t row = first; row < last; row++) {
        multiply(w, row, row + 1, low, high, panel, P, sums, P);
        memcpy(y + row * pixels + from, sums, sizeof(float) * (size_t)count);
    }
}

static int convolution(const Weight *w, const Shape *s, const float *x, float *y, int threads)
{
    const int64_t pixels = s->high * s->wide, image = s->channels * s->height * s->width;
    const int64_t each = (pixels + WIDEST - 1) / WIDEST, panels = s->count * each;
    int failed = 0;
    if (panels >= threads) {
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
        {
            float *panel = scratch(w->inputs * WIDEST);
            failed |= !panel;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < panels; i++) {
                const int64_t from = i % each * WIDEST, count = smaller(pixels - from, WIDEST);
                const int P = panel_width(count);
                int64_t low, high;
                live_groups(s, from, count, &low, &high);
                if (panel) {
                    for (int64_t tap = low * s->kernel[1]; tap < high * s->kernel[1]; tap++)
                        conv_pack(s, x + i / each * image, tap, 0, s->channels, from, count, P,
                                  panel);
                    conv_rows(w, s, panel, P, 0, w->outputs, from, count,
                              y + i / each * w->outputs * pixels);
                }
            }
            free(panel);
        }
        return failed;
    }
    float *panel = scratch(w->inputs * WIDEST);
    if (!panel)
        return 1;
    const int64_t chunks = (s->channels + CHUNK - 1) / CHUNK;
    for (int64_t i = 0; i < panels; i++) {
        const int64_t from = i % each * WIDEST, count = smaller(pixels - from, WIDEST);
        const int P = panel_width(count);
        int64_t low, high;
        live_groups(s, from, count, &low, &high);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t c = 0; c < chunks * (high - low) * s->kernel[1]; c++) {
                const int64_t first = c % chunks * CHUNK;
                conv_pack(s, x + i / each * image, low * s->kernel[1] + c / chunks, first,
                          smaller(first + CHUNK, s->channels), from, count, P, panel);
            }
#pragma omp for schedule(static, TILE)
            for (int64_t row = 0; row < w->outputs; row++)
                conv_rows(w, s, panel, P, row, row + 1, from, count,
                          y + i / each * w->outputs * pixels);
        }
    }
    free(panel);
    return 0;
}

/* What is called from outside. Returns 0, or 1 if memory ran out, or 2 if the parts of the weight
 * do not fit each other: they may come from a file, and nothing outside of a panel must be read. */

static int fits(const Weight *w, int64_t count)
{
    const int64_t rows = w->outputs * w->groups;
    int fine = w->start[0] == 0 && w->start[rows] == count;
    for (int64_t i = 0; i < rows; i++)
        fine &= w->start[i] <= w->start[i + 1];
    if (fine && w->groups > 1) { /* groups that see only padding are not packed, so not read */
        const int64_t each = w->inputs / w->groups;
        for (int64_t i = 0; i < rows; i++) {
            const int64_t low = i % w->groups * each, high = low + each;
            for (int64_t j = w->start[i]; j < w->start[i + 1]; j++) {
                const int64_t column = w->column16 ? w->column16[j] : w->column32[j];
                fine &= low <= column && column < high;
            }
        }
        return fine;
    }
    if (w->column16) {
        uint16_t most = 0;
        for (int64_t i = 0; i < count; i++)
            most = w->column16[i] > most ? w->column16[i] : most;
        return fine && (!count || most < w->inputs);
    }
    uint32_t most = 0; /* unsigned, so that what is negative is too large */
    for (int64_t i = 0; i < count; i++)
        most = (uint32_t)w->column32[i] > most ? (uint32_t)w->column32[i] : most;
    return fine && (!count || most < w->inputs);
}

/* Sizes, steps and margins: from 0 or 1 to 2^31 - 1, as is the number of inputs, so that no sum or
 * product of two overflows. */
static int measured(const int64_t *sizes, int count)
{
    const int64_t most = INT32_MAX;
    int fine = 1;
    for (int i = 0; i < count; i++)
        fine &= sizes[i] >= (i >= 6 && (i < 10 || i >= 12)) && sizes[i] <= most;
    return fine && sizes[6] <= most / sizes[7] &&
           (!sizes[1] || sizes[6] * sizes[7] <= most / sizes[1]);
}

int mtprune_linear(const int32_t *start, const void *column, const float *value, const float *bias,
                   int64_t count, int32_t wide, int64_t outputs, int64_t inputs, const float *x,
                   int64_t tokens, float *y, int32_t threads)
{
    const Weight w = {start, wide ? NULL : column, wide ? column : NULL, value, bias,
                      outputs, inputs, 1};
    return outputs >= 0 && 0 <= inputs && inputs <= INT32_MAX && fits(&w, count)
               ? linear(&w, x, tokens, y, threads)
               : 2;
}

/* sizes: images, channels, height, width of x; height and width of y; then, each for both
 * directions, kernel, stride, padding and dilation. */
int mtprune_conv(const int32_t *start, const void *column, const float *value, const float *bias,
                 int64_t count, int32_t wide, int64_t outputs, const int64_t *sizes,
                 const float *x, float *y, int32_t threads)
{
    if (outputs < 0 || !measured(sizes, 14))
        return 2;
    const Shape s = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
                     {sizes[6], sizes[7]}, {sizes[8], sizes[9]}, {sizes[10], sizes[11]},
                     {sizes[12], sizes[13]}};
    const Weight w = {start, wide ? NULL : column, wide ? column : NULL, value, bias,
                      outputs, s.channels * s.kernel[0] * s.kernel[1], s.kernel[0]};
    return fits(&w, count) ? convolution(&w, &s, x, y, threads) : 2;
}
