// Learned step size quantization on the CPU, forward and backward in one pass each: the kernels of native_lsq.py.
//
// A tensor is (outer, channels, inner), contiguous, with a step and a zero point per channel. Each of `threads` threads
// takes a range of rows and sums into memory of its own, so that a number of threads always gives the same result.
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

template <typename T>
struct Grid {
    const T *per_step, *zero;  // of the channels
    T qn, qp;
};

// Where x lies on the grid. torch fuses the sum where each value has a zero point of its own, given the instruction.
template <bool fused, typename T>
inline T position_of(T x, T per_step, T zero) {
#ifdef __FMA__
    if (fused) return std::fma(x, per_step, zero);
#endif
    return x * per_step + zero;
}

// x_hat / alpha; NaN stays NaN.
template <bool fused, typename T>
inline T in_steps(T x, T per_step, T zero, T qn, T qp) {
    T position = position_of<fused>(x, per_step, zero);
    position = position < qn ? qn : position;
    position = position > qp ? qp : position;
    return std::nearbyint(position) - zero;
}

// The gradient inside the range, 0 outside and for NaN; adds up grad c - dx p, dx and grad.
template <bool fused, typename T>
inline T backward(T grad, T x, T per_step, T zero, T qn, T qp, T low, T high, T& terms, T& inside, T& all) {
    const T position = position_of<fused>(x, per_step, zero);
    const T dx = position > low && position < high ? grad : T(0);
    terms += grad * in_steps<fused>(x, per_step, zero, qn, qp) - dx * position;
    inside += dx;
    all += grad;
    return dx;
}

// Calls f(thread, first, last) for each thread's range of `count` items.
template <typename F>
void split(int64_t count, int threads, F f) {
    const int64_t each = (count + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int thread = 0; thread < threads; ++thread)
        f(thread, std::min(count, thread * each), std::min(count, (thread + 1) * each));
}

template <typename T>
void steps(const T* x, T* out, int64_t outer, int64_t channels, int64_t inner, Grid<T> grid, int threads) {
    if (inner == 1) {
        split(outer, threads, [=](int, int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) {
                const T* from = x + row * channels;
                T* to = out + row * channels;
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c)
                    to[c] = in_steps<true>(from[c], grid.per_step[c], grid.zero[c], grid.qn, grid.qp);
            }
        });
        return;
    }
    split(outer * channels, threads, [=](int, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const T per_step = grid.per_step[row % channels], zero = grid.zero[row % channels];
            const T* from = x + row * inner;
            T* to = out + row * inner;
#pragma omp simd
            for (int64_t i = 0; i < inner; ++i)
                to[i] = in_steps<false>(from[i], per_step, zero, grid.qn, grid.qp);
        }
    });
}

template <typename T>
void backward_all(T* grad, const T* x, T* sums, int64_t outer, int64_t channels, int64_t inner, Grid<T> grid, T low,
                  T high, int threads) {
    if (inner == 1) {
        split(outer, threads, [=](int thread, int64_t first, int64_t last) {
            T *terms = sums + thread * 3 * channels, *inside = terms + channels, *all = inside + channels;
            for (int64_t row = first; row < last; ++row) {
                const T* from = x + row * channels;
                T* g = grad + row * channels;
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c)
                    g[c] = backward<true>(g[c], from[c], grid.per_step[c], grid.zero[c], grid.qn, grid.qp, low, high,
                                          terms[c], inside[c], all[c]);
            }
        });
        return;
    }
    split(outer * channels, threads, [=](int thread, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const int64_t channel = row % channels;
            const T per_step = grid.per_step[channel], zero = grid.zero[channel];
            const T* from = x + row * inner;
            T *g = grad + row * inner, terms = 0, inside = 0, all = 0;
#pragma omp simd reduction(+ : terms, inside, all)
            for (int64_t i = 0; i < inner; ++i)
                g[i] = backward<false>(g[i], from[i], per_step, zero, grid.qn, grid.qp, low, high, terms, inside, all);
            T* to = sums + thread * 3 * channels + channel;
            to[0] += terms, to[channels] += inside, to[2 * channels] += all;
        }
    });
}

}  // namespace

#define DEFINE(T, name)                                                                                              \
    void lsq_steps_##name(const T* x, T* out, int64_t outer, int64_t channels, int64_t inner, const T* per_step,     \
                          const T* zero, double qn, double qp, int threads) {                                        \
        steps<T>(x, out, outer, channels, inner, {per_step, zero, T(qn), T(qp)}, threads);                           \
    }                                                                                                                \
    void lsq_backward_##name(T* grad, const T* x, T* sums, int64_t outer, int64_t channels, int64_t inner,           \
                             const T* per_step, const T* zero, double qn, double qp, double low, double high,        \
                             int threads) {                                                                          \
        backward_all<T>(grad, x, sums, outer, channels, inner, {per_step, zero, T(qn), T(qp)}, T(low), T(high),      \
                        threads);                                                                                    \
    }

extern "C" {
DEFINE(float, float32)
DEFINE(double, float64)
}
