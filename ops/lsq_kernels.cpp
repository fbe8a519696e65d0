// The elementwise passes of learned step size quantization on the CPU, which cpu_kernels.py calls: forward and backward
// go through a tensor once each.
//
// A tensor is (outer, channels, rows, inner), with a scale and a zero point for each channel. Each of `threads` threads
// takes a range of it and sums into memory of its own, so that the same number of threads gives the same result.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// --- functions of one value ------------------------------------------------------------------------------------------

template <typename T>
inline T multiply_add(T a, T b, T c) {
#ifdef __FMA__
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
}

// The polynomial of x with these coefficients, the highest first.
template <typename T>
inline T polynomial(T, T last) {
    return last;
}

template <typename T, typename... Rest>
inline T polynomial(T x, T first, T second, Rest... rest) {
    return polynomial(x, multiply_add(first, x, second), rest...);
}

// exp(x) for x <= 0, to a few units in the last place; 0 below -87, about where normal numbers end. NaN stays NaN.
inline float exponential(float from) {
    constexpr float log2_e = 1.44269504f, ln2_high = .693359375f, ln2_low = -2.12194440e-4f;  // ln 2 = high + low
    const float x = from < -87.f ? -87.f : from;
    const float n = std::nearbyint(x * log2_e);
    const float r = multiply_add(n, -ln2_low, multiply_add(n, -ln2_high, x));  // |r| <= ln 2 / 2: Taylor
    const float e = polynomial(r, 1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f);
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;  // 2^n
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return from < -87.f ? 0.f : e * power;
}

inline double exponential(double x) { return std::exp(x); }

// The distribution function of the normal distribution at x; `bell` becomes exp(-x^2 / 2).
inline float normal(float x, float& bell) {
    const float z = std::fabs(x) * .70710678f, t = 1.f / multiply_add(z, .3f, 1.f);
    bell = exponential(x * x * -.5f);
    // erfc(z) / (t exp(-z^2)), a polynomial of t with an error below 2e-8 of it for z < 9.4, beyond which exp is 0
    float upper = polynomial(t, -.129406721f, .484952480f, -.510901630f, .545985162f, -.0933153108f, .214284182f,
                             .148527011f, .170684665f, .169190124f);
    upper *= .5f * t * bell;  // half of erfc(z): what lies beyond |x|
    return x < 0 ? upper : 1 - upper;
}

inline double normal(double x, double& bell) {
    bell = std::exp(x * x * -.5);
    return .5 * std::erfc(x * -.70710678118654752);
}

// min(GELU(x), 10); `slope` becomes its derivative, 0 for NaN. GELU is never below -10, so nothing is clipped there.
template <typename T>
inline T clipped_gelu(T x, T& slope) {
    T bell;
    const T phi = normal(x, bell), y = x * phi;
    slope = y <= 10 ? multiply_add(x * T(.39894228040143268), bell, phi) : T(0);  // bell / sqrt(2 pi): the density
    return y > 10 ? T(10) : y;
}

// Where x lies on the grid. Where each value of a row has a zero point of its own, torch multiplies and adds with one
// rounding, given that instruction, and so does this.
template <bool fused, typename T>
inline T position_of(T x, T reciprocal, T zero) {
    return fused ? multiply_add(x, reciprocal, zero) : x * reciprocal + zero;
}

// The centered code of a position: its code less the zero point. NaN stays NaN.
template <typename T>
inline T centered_code(T position, T zero, T qn, T qp) {
    position = position < qn ? qn : position;
    position = position > qp ? qp : position;
    return std::nearbyint(position) - zero;
}

// Returns the gradient inside the range, and 0 outside and for NaN. Adds grad c - dx p, dx and grad to the sums, with
// the centered code c and the position p.
template <typename T>
inline T backward(T grad, T position, T zero, T qn, T qp, T low, T high, T& terms, T& inside, T& all) {
    const T dx = position > low && position < high ? grad : T(0);
    terms += grad * centered_code(position, zero, qn, qp) - dx * position;
    inside += dx;
    all += grad;
    return dx;
}

// --- whole tensors ---------------------------------------------------------------------------------------------------

template <typename T>
struct Grid {
    const T *reciprocal, *zero;  // 1 / scale and zero point of each channel
    int64_t channels;
    T qn, qp, low, high;  // the codes, and the borders within which gradients pass
};

// Calls f(thread, first, last) on every thread, with its range of the `count` items.
template <typename F>
void split(int64_t count, int threads, F f) {
    const int64_t each = (count + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int thread = 0; thread < threads; ++thread)
        f(thread, std::min(count, thread * each), std::min(count, (thread + 1) * each));
}

template <bool fused, bool gelu, typename T>
inline T centered_code_of(T x, T reciprocal, T zero, T qn, T qp) {
    T slope;
    if (gelu) x = clipped_gelu(x, slope);
    return centered_code(position_of<fused>(x, reciprocal, zero), zero, qn, qp);
}

// The sizes of x, and the strides of outer, channels and rows in it. Results are contiguous.
struct Layout {
    int64_t outer, rows, inner, of_outer, of_channel, of_row;
};

template <bool gelu, typename T>
void codes(const T* x, T* out, Layout at, Grid<T> grid, int threads) {
    const int64_t channels = grid.channels;
    if (at.inner == 1 && at.rows == 1) {
        split(at.outer, threads, [=](int, int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) {
                const T* from = x + row * channels;
                T* to = out + row * channels;
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c)
                    to[c] = centered_code_of<true, gelu>(from[c], grid.reciprocal[c], grid.zero[c], grid.qn, grid.qp);
            }
        });
        return;
    }
    split(at.outer * channels, threads, [=](int, int64_t first, int64_t last) {
        for (int64_t index = first; index < last; ++index) {
            const int64_t channel = index % channels;
            const T reciprocal = grid.reciprocal[channel], zero = grid.zero[channel];
            for (int64_t row = 0; row < at.rows; ++row) {
                const T* from = x + index / channels * at.of_outer + channel * at.of_channel + row * at.of_row;
                T* to = out + (index * at.rows + row) * at.inner;
#pragma omp simd
                for (int64_t i = 0; i < at.inner; ++i)
                    to[i] = centered_code_of<false, gelu>(from[i], reciprocal, zero, grid.qn, grid.qp);
            }
        }
    });
}

// w_hat, (channels, inner), times a factor for each column where there are factors.
template <typename T>
void weight(const T* w, const T* scale, const T* factor, T* out, int64_t inner, Grid<T> grid, int threads) {
    split(grid.channels, threads, [=](int, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const T reciprocal = grid.reciprocal[row], of_row = scale[row];
            const T* from = w + row * inner;
            T* to = out + row * inner;
            if (factor == nullptr)
#pragma omp simd
                for (int64_t i = 0; i < inner; ++i)
                    to[i] = centered_code(from[i] * reciprocal, T(0), grid.qn, grid.qp) * of_row;
            else
#pragma omp simd
                for (int64_t i = 0; i < inner; ++i)
                    to[i] = centered_code(from[i] * reciprocal, T(0), grid.qn, grid.qp) * of_row * factor[i];
        }
    });
}

// Turns `grad`, the gradient of x_hat, into that of x; with `gelu`, x is the GELU's input.
template <bool gelu, typename T>
void backward_all(T* grad, const T* x, T* sums, Layout at, Grid<T> grid, int threads) {
    const int64_t channels = grid.channels;
    if (at.inner == 1 && at.rows == 1) {
        split(at.outer, threads, [=](int thread, int64_t first, int64_t last) {
            T *terms = sums + thread * 3 * channels, *inside = terms + channels, *all = inside + channels;
            for (int64_t row = first; row < last; ++row) {
                const T* from = x + row * channels;
                T* g = grad + row * channels;
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) {
                    T slope = 1;
                    const T value = gelu ? clipped_gelu(from[c], slope) : from[c], zero = grid.zero[c];
                    g[c] = slope * backward(g[c], position_of<true>(value, grid.reciprocal[c], zero), zero, grid.qn,
                                            grid.qp, grid.low, grid.high, terms[c], inside[c], all[c]);
                }
            }
        });
        return;
    }
    split(at.outer * channels, threads, [=](int thread, int64_t first, int64_t last) {
        for (int64_t index = first; index < last; ++index) {
            const int64_t channel = index % channels;
            const T reciprocal = grid.reciprocal[channel], zero = grid.zero[channel];
            T terms = 0, inside = 0, all = 0;
            for (int64_t row = 0; row < at.rows; ++row) {
                const T* from = x + index / channels * at.of_outer + channel * at.of_channel + row * at.of_row;
                T* g = grad + (index * at.rows + row) * at.inner;
#pragma omp simd reduction(+ : terms, inside, all)
                for (int64_t i = 0; i < at.inner; ++i) {
                    T slope = 1;
                    const T value = gelu ? clipped_gelu(from[i], slope) : from[i];
                    g[i] = slope * backward(g[i], position_of<false>(value, reciprocal, zero), zero, grid.qn, grid.qp,
                                            grid.low, grid.high, terms, inside, all);
                }
            }
            T* to = sums + thread * 3 * channels + channel;
            to[0] += terms, to[channels] += inside, to[2 * channels] += all;
        }
    });
}

// --- attention: rows of scores, `tokens` long; each channel is a head and has `tokens` rows -------------------------

// The softmax of each row, and its centered codes in `out`. The memory of `softmax` may be that of `scores`, and `out`
// may be that of `softmax`, which is then not kept.
template <typename T>
void softmax_codes(const T* scores, T* softmax, T* out, int64_t rows, int64_t tokens, Grid<T> grid, int threads) {
    split(rows, threads, [=](int, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const int64_t channel = row / tokens % grid.channels;
            const T reciprocal = grid.reciprocal[channel], zero = grid.zero[channel];
            const T* from = scores + row * tokens;
            T *probability = softmax + row * tokens, *to = out + row * tokens, largest = from[0], sum = 0;
#pragma omp simd reduction(max : largest)
            for (int64_t i = 0; i < tokens; ++i) largest = from[i] > largest ? from[i] : largest;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < tokens; ++i) sum += probability[i] = exponential(from[i] - largest);
            const T scale = 1 / sum;
#pragma omp simd
            for (int64_t i = 0; i < tokens; ++i) {
                const T value = probability[i] * scale;
                probability[i] = value;
                to[i] = centered_code(position_of<false>(value, reciprocal, zero), zero, grid.qn, grid.qp);
            }
        }
    });
}

// Turns `grad`, the gradient of the quantized softmax, into that of the scores.
template <typename T>
void softmax_backward(T* grad, const T* softmax, T* sums, int64_t rows, int64_t tokens, Grid<T> grid, int threads) {
    split(rows, threads, [=](int thread, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const int64_t channel = row / tokens % grid.channels;
            const T reciprocal = grid.reciprocal[channel], zero = grid.zero[channel];
            const T* probability = softmax + row * tokens;
            T *g = grad + row * tokens, terms = 0, inside = 0, all = 0, mean = 0;
#pragma omp simd reduction(+ : terms, inside, all, mean)
            for (int64_t i = 0; i < tokens; ++i) {
                const T position = position_of<false>(probability[i], reciprocal, zero);
                const T dx = backward(g[i], position, zero, grid.qn, grid.qp, grid.low, grid.high, terms, inside, all);
                mean += dx * probability[i];
                g[i] = dx;
            }
#pragma omp simd
            for (int64_t i = 0; i < tokens; ++i) g[i] = probability[i] * (g[i] - mean);
            T* to = sums + thread * 3 * grid.channels + channel;
            to[0] += terms, to[grid.channels] += inside, to[2 * grid.channels] += all;
        }
    });
}

}  // namespace

#define LAYOUT int64_t outer, int64_t rows, int64_t inner, int64_t of_outer, int64_t of_channel, int64_t of_row
#define AT Layout{outer, rows, inner, of_outer, of_channel, of_row}
#define GRID(T) const T *reciprocal, const T *zero, int64_t channels, double qn, double qp, double low, double high
#define OF(T) Grid<T>{reciprocal, zero, channels, T(qn), T(qp), T(low), T(high)}
#define DEFINE(T, name)                                                                                               \
    void lsq_codes_##name(const T* x, T* out, LAYOUT, int gelu, GRID(T), int threads) {                               \
        (gelu ? codes<true, T> : codes<false, T>)(x, out, AT, OF(T), threads);                                        \
    }                                                                                                                 \
    void lsq_weight_##name(const T* w, const T* scale, const T* factor, T* out, int64_t inner, GRID(T), int threads) {\
        weight<T>(w, scale, factor, out, inner, OF(T), threads);                                                      \
    }                                                                                                                 \
    void lsq_backward_##name(T* grad, const T* x, T* sums, LAYOUT, int gelu, GRID(T), int threads) {                  \
        (gelu ? backward_all<true, T> : backward_all<false, T>)(grad, x, sums, AT, OF(T), threads);                   \
    }                                                                                                                 \
    void lsq_softmax_##name(const T* scores, T* softmax, T* out, int64_t rows, int64_t tokens, GRID(T),               \
                            int threads) {                                                                            \
        softmax_codes<T>(scores, softmax, out, rows, tokens, OF(T), threads);                                         \
    }                                                                                                                 \
    void lsq_softmax_backward_##name(T* grad, const T* softmax, T* sums, int64_t rows, int64_t tokens, GRID(T),       \
                                     int threads) {                                                                   \
        softmax_backward<T>(grad, softmax, sums, rows, tokens, OF(T), threads);                                       \
    }

extern "C" {
DEFINE(float, float32)
DEFINE(double, float64)
}
