// Learned step size quantization on the CPU, forward and backward in one pass each: the kernels of native_training.py.
//
// A tensor is (outer, channels, rows, inner), with a step and a zero point per channel. Each of `threads` threads takes
// a range of it and sums into memory of its own, so that a number of threads always gives the same result.
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

// The normal distribution's function at x, and in `bell` exp(-x^2 / 2).
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

// min(GELU(x), 10), and in `slope` its derivative, 0 for NaN. GELU is never below -10.
template <typename T>
inline T clipped_gelu(T x, T& slope) {
    T bell;
    const T phi = normal(x, bell), y = x * phi;
    slope = y < 10 ? multiply_add(x * T(.39894228040143268), bell, phi) : T(0);  // bell / sqrt(2 pi): the density
    return y > 10 ? T(10) : y;
}

// Where x lies on the grid. torch fuses the sum where each value has a zero point of its own, given the instruction.
template <bool fused, typename T>
inline T position_of(T x, T per_step, T zero) {
    return fused ? multiply_add(x, per_step, zero) : x * per_step + zero;
}

// x_hat / alpha of a position; NaN stays NaN.
template <typename T>
inline T in_steps(T position, T zero, T qn, T qp) {
    position = position < qn ? qn : position;
    position = position > qp ? qp : position;
    return std::nearbyint(position) - zero;
}

// The gradient inside the range, 0 outside and for NaN; adds up grad c - dx p, dx and grad.
template <typename T>
inline T backward(T grad, T position, T zero, T qn, T qp, T low, T high, T& terms, T& inside, T& all) {
    const T dx = position > low && position < high ? grad : T(0);
    terms += grad * in_steps(position, zero, qn, qp) - dx * position;
    inside += dx;
    all += grad;
    return dx;
}

// --- whole tensors ---------------------------------------------------------------------------------------------------

template <typename T>
struct Grid {
    const T *per_step, *zero;  // of the channels
    int64_t channels;
    T qn, qp, low, high;  // the codes, and the borders within which gradients pass
};

// Calls f(thread, first, last) for each thread's range of `count` items.
template <typename F>
void split(int64_t count, int threads, F f) {
    const int64_t each = (count + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int thread = 0; thread < threads; ++thread)
        f(thread, std::min(count, thread * each), std::min(count, (thread + 1) * each));
}

template <bool fused, bool gelu, typename T>
inline T value_in_steps(T x, T per_step, T zero, T qn, T qp) {
    T slope;
    if (gelu) x = clipped_gelu(x, slope);
    return in_steps(position_of<fused>(x, per_step, zero), zero, qn, qp);
}

// Of x and of what is not contiguous about it: the strides of outer, channels and rows; results are contiguous.
struct Layout {
    int64_t outer, rows, inner, of_outer, of_channel, of_row;
};

template <bool gelu, typename T>
void steps(const T* x, T* out, Layout at, Grid<T> grid, int threads) {
    const int64_t channels = grid.channels;
    if (at.inner == 1 && at.rows == 1) {
        split(at.outer, threads, [=](int, int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) {
                const T* from = x + row * channels;
                T* to = out + row * channels;
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c)
                    to[c] = value_in_steps<true, gelu>(from[c], grid.per_step[c], grid.zero[c], grid.qn, grid.qp);
            }
        });
        return;
    }
    split(at.outer * channels, threads, [=](int, int64_t first, int64_t last) {
        for (int64_t index = first; index < last; ++index) {
            const int64_t channel = index % channels;
            const T per_step = grid.per_step[channel], zero = grid.zero[channel];
            for (int64_t row = 0; row < at.rows; ++row) {
                const T* from = x + index / channels * at.of_outer + channel * at.of_channel + row * at.of_row;
                T* to = out + (index * at.rows + row) * at.inner;
#pragma omp simd
                for (int64_t i = 0; i < at.inner; ++i)
                    to[i] = value_in_steps<false, gelu>(from[i], per_step, zero, grid.qn, grid.qp);
            }
        }
    });
}

// w_hat, (channels, inner), times a scale per column where there is one.
template <typename T>
void weight(const T* w, const T* step, const T* scale, T* out, int64_t inner, Grid<T> grid, int threads) {
    split(grid.channels, threads, [=](int, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const T per_step = grid.per_step[row], of_row = step[row];
            const T* from = w + row * inner;
            T* to = out + row * inner;
            if (scale == nullptr)
#pragma omp simd
                for (int64_t i = 0; i < inner; ++i)
                    to[i] = in_steps(from[i] * per_step, T(0), grid.qn, grid.qp) * of_row;
            else
#pragma omp simd
                for (int64_t i = 0; i < inner; ++i)
                    to[i] = in_steps(from[i] * per_step, T(0), grid.qn, grid.qp) * of_row * scale[i];
        }
    });
}

// `grad`, of x_hat, becomes that of x, or with `gelu` of the GELU's input x.
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
                    g[c] = slope * backward(g[c], position_of<true>(value, grid.per_step[c], zero), zero, grid.qn,
                                            grid.qp, grid.low, grid.high, terms[c], inside[c], all[c]);
                }
            }
        });
        return;
    }
    split(at.outer * channels, threads, [=](int thread, int64_t first, int64_t last) {
        for (int64_t index = first; index < last; ++index) {
            const int64_t channel = index % channels;
            const T per_step = grid.per_step[channel], zero = grid.zero[channel];
            T terms = 0, inside = 0, all = 0;
            for (int64_t row = 0; row < at.rows; ++row) {
                const T* from = x + index / channels * at.of_outer + channel * at.of_channel + row * at.of_row;
                T* g = grad + (index * at.rows + row) * at.inner;
#pragma omp simd reduction(+ : terms, inside, all)
                for (int64_t i = 0; i < at.inner; ++i) {
                    T slope = 1;
                    const T value = gelu ? clipped_gelu(from[i], slope) : from[i];
                    g[i] = slope * backward(g[i], position_of<false>(value, per_step, zero), zero, grid.qn, grid.qp,
                                            grid.low, grid.high, terms, inside, all);
                }
            }
            T* to = sums + thread * 3 * channels + channel;
            to[0] += terms, to[channels] += inside, to[2 * channels] += all;
        }
    });
}

// --- attention: rows of scores, `tokens` long, `tokens` of them to each channel in turn ------------------------------

// The softmax of each row and its steps. `softmax` may be `scores`, and `out` either, where that is not kept.
template <typename T>
void softmax_steps(const T* scores, T* softmax, T* out, int64_t rows, int64_t tokens, Grid<T> grid, int threads) {
    split(rows, threads, [=](int, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const int64_t channel = row / tokens % grid.channels;
            const T per_step = grid.per_step[channel], zero = grid.zero[channel];
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
                to[i] = in_steps(position_of<false>(value, per_step, zero), zero, grid.qn, grid.qp);
            }
        }
    });
}

// `grad`, of the quantized softmax, becomes that of the scores.
template <typename T>
void softmax_backward(T* grad, const T* softmax, T* sums, int64_t rows, int64_t tokens, Grid<T> grid, int threads) {
    split(rows, threads, [=](int thread, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const int64_t channel = row / tokens % grid.channels;
            const T per_step = grid.per_step[channel], zero = grid.zero[channel];
            const T* probability = softmax + row * tokens;
            T *g = grad + row * tokens, terms = 0, inside = 0, all = 0, mean = 0;
#pragma omp simd reduction(+ : terms, inside, all, mean)
            for (int64_t i = 0; i < tokens; ++i) {
                const T dx = backward(g[i], position_of<false>(probability[i], per_step, zero), zero, grid.qn, grid.qp,
                                      grid.low, grid.high, terms, inside, all);
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
#define GRID(T) const T *per_step, const T *zero, int64_t channels, double qn, double qp, double low, double high
#define OF(T) Grid<T>{per_step, zero, channels, T(qn), T(qp), T(low), T(high)}
#define DEFINE(T, name)                                                                                               \
    void lsq_codes_##name(const T* x, T* out, LAYOUT, int gelu, GRID(T), int threads) {                               \
        (gelu ? steps<true, T> : steps<false, T>)(x, out, AT, OF(T), threads);                                        \
    }                                                                                                                 \
    void lsq_weight_##name(const T* w, const T* step, const T* scale, T* out, int64_t inner, GRID(T), int threads) {  \
        weight<T>(w, step, scale, out, inner, OF(T), threads);                                                        \
    }                                                                                                                 \
    void lsq_backward_##name(T* grad, const T* x, T* sums, LAYOUT, int gelu, GRID(T), int threads) {                  \
        (gelu ? backward_all<true, T> : backward_all<false, T>)(grad, x, sums, AT, OF(T), threads);                   \
    }                                                                                                                 \
    void lsq_softmax_##name(const T* scores, T* softmax, T* out, int64_t rows, int64_t tokens, GRID(T),               \
                            int threads) {                                                                            \
        softmax_steps<T>(scores, softmax, out, rows, tokens, OF(T), threads);                                         \
    }                                                                                                                 \
    void lsq_softmax_backward_##name(T* grad, const T* softmax, T* sums, int64_t rows, int64_t tokens, GRID(T),       \
                                     int threads) {                                                                   \
        softmax_backward<T>(grad, softmax, sums, rows, tokens, OF(T), threads);                                       \
    }

extern "C" {
DEFINE(float, float32)
DEFINE(double, float64)
}
