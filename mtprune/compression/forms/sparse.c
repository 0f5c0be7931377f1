/* Layers whose weight is a sparse matrix: Linear, and convolutions.
 *
 * What the weight is multiplied with is packed into panels: columns (tokens or pixels) side by side,
 * so that one weight meets neighbouring numbers, which are vectors. Rows of a panel are inputs, or,
 * for a convolution, its taps.
 *
 * Each output is summed up in one order, whatever the number of threads. No library is needed but
 * libc; with OpenMP, panels are spread over threads, or tiles of outputs where there are few panels. */

#include "packed.h"

/* Linear: y[tokens, outputs] = x[tokens, inputs] W^T + b. */

/* Inputs [from, to) of `count` tokens; columns past them are summed up too, so they are zero. */
static void linear_pack(const float *x, int64_t inputs, int64_t from, int64_t to, int64_t count,
                        int P, float *panel)
{
    if (count < P)
        memset(panel + from * P, 0, sizeof(float) * (size_t)((to - from) * P));
    turn(x + from, count, to - from, inputs, panel + from * P, P);
}

/* One tile of outputs of `count` tokens. */
static void linear_tile(const Product *w, int64_t tile, const float *panel, int P, int64_t count,
                        float *y)
{
    float sums[LINES * SPAN] __attribute__((aligned(64)));
    const int64_t first = tile * LINES, rows = smaller(LINES, w->outputs - first);
    /* What is written to is on its way while it is made. */
    for (int64_t token = 0; token < count; token++)
        for (int64_t r = 0; r < rows; r += 16)
            __builtin_prefetch(y + token * w->outputs + first + r, 1);
    tile_of_product(w, tile, panel, P, sums, STORED, -1);
    turn(sums, rows, count, P, y + first, w->outputs);
}

static int linear(const Product *w, const float *x, int64_t tokens, float *y, int threads)
{
    const int64_t panels = rounded(tokens, SPAN), tiles = rounded(w->outputs, LINES);
    int failed = 0;
    if (panels >= threads) {
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
        {
            float *panel = scratch(w->inputs * SPAN);
            failed |= !panel;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < panels; i++) {
                const int64_t from = i * SPAN, count = smaller(tokens - from, SPAN);
                const int P = panel_width(count);
                if (!panel)
                    continue;
                linear_pack(x + from * w->inputs, w->inputs, 0, w->inputs, count, P, panel);
                for (int64_t tile = 0; tile < tiles; tile++)
                    linear_tile(w, tile, panel, P, count, y + from * w->outputs);
            }
            free(panel);
        }
        return failed;
    }
    float *panel = scratch(w->inputs * SPAN);
    if (!panel)
        return 1;
    const int64_t bands = rounded(w->inputs, TILE);
    for (int64_t i = 0; i < panels; i++) {
        const int64_t from = i * SPAN, count = smaller(tokens - from, SPAN);
        const int P = panel_width(count);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < bands; t++) {
                const int64_t last = smaller((t + 1) * TILE, w->inputs);
                linear_pack(x + from * w->inputs, w->inputs, t * TILE, last, count, P, panel);
            }
#pragma omp for schedule(static)
            for (int64_t tile = 0; tile < tiles; tile++)
                linear_tile(w, tile, panel, P, count, y + from * w->outputs);
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

/* Taps and inputs that pixels read, without rows of the kernel that see nothing but padding. */
typedef struct {
    int64_t low, high; /* inputs */
    int64_t first, last; /* taps: all that the groups of these inputs have */
} Live;

static Live live_part(const Shape *s, int64_t inputs, int64_t from, int64_t count)
{
    const int64_t top = from / s->wide * s->stride[0] - s->padding[0];
    const int64_t bottom = (from + count - 1) / s->wide * s->stride[0] - s->padding[0];
    const int64_t low = smaller(larger(quotient_up(-bottom, s->dilation[0]), 0), s->kernel[0]);
    const int64_t high =
        smaller(larger(quotient_up(s->height - top, s->dilation[0]), low), s->kernel[0]);
    const int64_t each = s->kernel[1] * s->channels;
    Live live = {low * each, high * each, 0, 0};
    const int64_t end = smaller(rounded(live.high, GROUP) * GROUP, inputs);
    if (s->channels) {
        live.first = live.low / GROUP * GROUP / s->channels;
        live.last = rounded(end, s->channels);
    }
    return live;
}

/* The rows of the panel for one tap and channels [first, last). */
static void conv_pack(const Shape *s, const float *image, int64_t tap, int64_t first, int64_t last,
                      int64_t from, int64_t count, int P, float *panel)
{
    Run runs[SPAN];
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

/* One tile of outputs of pixels [from, from + count) of one image. */
static void conv_tile(const Product *w, int64_t tile, Live live, const float *panel, int P,
                      int64_t pixels, int64_t from, int64_t count, float *y)
{
    float sums[LINES * SPAN] __attribute__((aligned(64)));
    const int64_t first = tile * LINES, rows = smaller(LINES, w->outputs - first);
    part_of_product(w, tile, live.low, live.high, panel, P, sums, STORED, -1);
    for (int64_t r = 0; r < rows; r++)
        copy(sums + r * P, 1, count, y + (first + r) * pixels + from);
}

static int convolution(const Product *w, const Shape *s, const float *x, float *y, int threads)
{
    const int64_t pixels = s->high * s->wide, image = s->channels * s->height * s->width;
    const int64_t each = rounded(pixels, SPAN), panels = s->count * each;
    const int64_t tiles = rounded(w->outputs, LINES);
    int failed = 0;
    if (panels >= threads) {
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
        {
            float *panel = scratch(w->inputs * SPAN);
            failed |= !panel;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < panels; i++) {
                const int64_t from = i % each * SPAN, count = smaller(pixels - from, SPAN);
                const int P = panel_width(count);
                const Live live = live_part(s, w->inputs, from, count);
                if (!panel)
                    continue;
                for (int64_t tap = live.first; tap < live.last; tap++)
                    conv_pack(s, x + i / each * image, tap, 0, s->channels, from, count, P, panel);
                for (int64_t tile = 0; tile < tiles; tile++)
                    conv_tile(w, tile, live, panel, P, pixels, from, count,
                              y + i / each * w->outputs * pixels);
            }
            free(panel);
        }
        return failed;
    }
    float *panel = scratch(w->inputs * SPAN);
    if (!panel)
        return 1;
    const int64_t chunks = rounded(s->channels, CHUNK);
    for (int64_t i = 0; i < panels; i++) {
        const int64_t from = i % each * SPAN, count = smaller(pixels - from, SPAN);
        const int P = panel_width(count);
        const Live live = live_part(s, w->inputs, from, count);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t c = 0; c < chunks * (live.last - live.first); c++) {
                const int64_t first = c % chunks * CHUNK;
                conv_pack(s, x + i / each * image, live.first + c / chunks, first,
                          smaller(first + CHUNK, s->channels), from, count, P, panel);
            }
#pragma omp for schedule(static)
            for (int64_t tile = 0; tile < tiles; tile++)
                conv_tile(w, tile, live, panel, P, pixels, from, count,
                          y + i / each * w->outputs * pixels);
        }
    }
    free(panel);
    return 0;
}

/* What is called from outside. */

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

/* Whether the parts of a sparse weight fit each other: 0, or 2 if they do not. What fits is multiplied
 * without looking again. */
int mtprune_check(const Product *w)
{
    const int64_t most = INT32_MAX;
    return !w->dense && w->outputs <= most && w->inputs <= most && fits(w, w->outputs, w->inputs)
               ? 0
               : 2;
}

/* Returns 0, or 1 if memory ran out. */
int mtprune_linear(const Product *w, const float *x, int64_t tokens, float *y, int32_t threads)
{
    return linear(w, x, tokens, y, threads);
}

/* sizes: images, channels, height, width of x; height and width of y; then, each for both
 * directions, kernel, stride, padding and dilation. Returns 0, or 1 if memory ran out, or 2 if sizes
 * are none, or do not fit the weight. */
int mtprune_conv(const Product *w, const int64_t *sizes, const float *x, float *y, int32_t threads)
{
    if (!measured(sizes, 14))
        return 2;
    const Shape s = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
                     {sizes[6], sizes[7]}, {sizes[8], sizes[9]}, {sizes[10], sizes[11]},
                     {sizes[12], sizes[13]}};
    if (w->inputs != s.channels * s.kernel[0] * s.kernel[1])
        return 2;
    return convolution(w, &s, x, y, threads);
}
