// Distribution-guided distillation on the CPU: distance of two normalised Gram matrices and its gradient, one image and
// head at a time, so that all of it stays in the cache. The formulas are those of losses.py's _GramDistance.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#define APART __attribute__((noinline))  // inlined, blocks of sums would leave the registers

namespace {

// --- products: of matrices whose rows are `width` values, `padded`, 0 where there is no data -------------------------

#if defined(__AVX512F__)
constexpr int BYTES = 64, ROWS = 8;  // of a register; of a block of a product: with 3 vectors each, 24 of 32 registers
#elif defined(__AVX__)
constexpr int BYTES = 32, ROWS = 4;  // 12 of 16
#else
constexpr int BYTES = 16, ROWS = 4;
#endif

template <typename T>
struct Vector {
    typedef T type __attribute__((vector_size(BYTES)));
    static constexpr int LANES = BYTES / sizeof(T);
};

template <typename T>
constexpr int64_t padded(int64_t size) {
    constexpr int64_t to = std::max(Vector<T>::LANES, ROWS);
    return (size + to - 1) / to * to;
}

// ROWS x VECTORS vectors of left @ right. left[r, k] is at left[r * row + k * column]; right has `depth` rows.
template <int VECTORS, typename T>
struct Block {
    typename Vector<T>::type sums[ROWS][VECTORS] = {};

    inline void add(const T* left, int64_t row, int64_t column, const T* right, int64_t width, int64_t depth) {
        for (int64_t k = 0; k < depth; ++k) {
            typename Vector<T>::type values[VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) std::memcpy(&values[v], right + k * width + v * Vector<T>::LANES, BYTES);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; ++v) sums[r][v] += left[r * row + k * column] * values[v];
        }
    }

    inline void load(const T* from, int64_t width) {
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) std::memcpy(&sums[r][v], from + r * width + v * Vector<T>::LANES, BYTES);
    }

    inline void store(T* out, int64_t width) const {
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) std::memcpy(out + r * width + v * Vector<T>::LANES, &sums[r][v], BYTES);
    }
};

// Calls f(first column, a Block of as many vectors) for `vectors` of them: blocks that fit the registers.
template <typename T, typename F>
inline void for_blocks(int64_t first, int64_t vectors, F f) {
    constexpr int LANES = Vector<T>::LANES;
    for (; vectors > 3; vectors -= 2, first += 2 * LANES) f(first, Block<2, T>());
    if (vectors == 3) f(first, Block<3, T>());
    if (vectors == 2) f(first, Block<2, T>());
    if (vectors == 1) f(first, Block<1, T>());
}

// left^T @ right, (width, width), of `depth` rows each; where both are the same, of one half only what is needed.
template <typename T>
APART void gram(const T* left, const T* right, T* out, int64_t width, int64_t depth) {
    constexpr int64_t LANES = Vector<T>::LANES, PIECE = 48;  // rows, which the innermost cache holds for all blocks
    for (int64_t k = 0; k < depth; k += PIECE)
        for (int64_t row = 0; row < width; row += ROWS) {
            const int64_t start = left == right ? row / LANES * LANES : 0;
            for_blocks<T>(start, (width - start) / LANES, [=](int64_t first, auto block) {
                if (k > 0) block.load(out + row * width + first, width);
                block.add(left + k * width + row, 1, width, right + k * width + first, width,
                          std::min(PIECE, depth - k));
                block.store(out + row * width + first, width);
            });
        }
    if (left != right) return;
    for (int64_t i = 0; i < width; ++i)
        for (int64_t j = 0; j < i / LANES * LANES; ++j) out[i * width + j] = out[j * width + i];
}

template <typename T>
T inner(const T* a, const T* b, int64_t size) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
    return sum;
}

// --- the distance ----------------------------------------------------------------------------------------------------

template <typename T>
struct Matrices {  // (images, heads, tokens, width of the data); the strides of the first three, in values
    const T* data;
    int64_t image, head, token;
};

template <typename T>
T square(const T* data, int64_t stride, int64_t tokens, int64_t size) {
    T sum = 0;
    for (int64_t n = 0; n < tokens; ++n) {
        for (int64_t i = 0; i < size; i += Vector<T>::LANES) __builtin_prefetch(data + (n + 8) * stride + i);
        sum += inner(data + n * stride, data + n * stride, size);
    }
    return sum;
}

template <typename T>
T at_least(T x, T least) {  // NaN stays NaN
    return x < least ? least : x;
}

// Memory for one pair of matrices: M and B, (tokens in whole blocks, width), and products of (width, width).
template <typename T>
struct Scratch {
    static constexpr size_t ALIGNMENT = 64;
    int64_t width, rows, products;
    std::vector<T> memory;
    T *m, *b, *k, *x_t, *c, *of_m, *of_b, *rows_of_block;

    Scratch(int64_t tokens, int64_t size)
        : width(padded<T>(size)),
          rows((tokens + ROWS - 1) / ROWS * ROWS),
          products(width * width),
          memory(2 * rows * width + 5 * products + ROWS * width + ALIGNMENT / sizeof(T)) {
        void* aligned = memory.data();
        size_t space = memory.size() * sizeof(T);
        m = static_cast<T*>(std::align(ALIGNMENT, space - ALIGNMENT, aligned, space));
        b = m + rows * width, k = b + rows * width;
        x_t = k + products, c = x_t + products, of_m = c + products, of_b = of_m + products;
        rows_of_block = of_b + products;
    }
    Scratch(const Scratch&) = delete;
};

// m @ of_m + b @ of_b, (tokens, size), by way of `rows`, a block of them.
template <typename T>
APART void gradient(const T* m, const T* of_m, const T* b, const T* of_b, T* rows, T* grad, int64_t tokens,
                    int64_t size, int64_t width) {
    for (int64_t n = 0; n < tokens; n += ROWS) {
        for_blocks<T>(0, width / Vector<T>::LANES, [=](int64_t first, auto block) {
            block.add(m + n * width, width, 1, of_m + first, width, width);
            block.add(b + n * width, width, 1, of_b + first, width, width);
            block.store(rows + first, width);
        });
        for (int64_t row = n; row < std::min(tokens, n + ROWS); ++row)
            std::memcpy(grad + row * size, rows + (row - n) * width, size * sizeof(T));
    }
}

template <typename T>
void distance_and_gradient(const T* a, int64_t a_token, const T* b, int64_t b_token, T* distance, T* grad,
                           int64_t tokens, int64_t size, Scratch<T>& at) {
    const int64_t width = at.width, products = at.products;
    const T norm_a = std::sqrt(square(a, a_token, tokens, size)), norm_b = std::sqrt(square(b, b_token, tokens, size));
    const bool has_a = norm_a != 0, has_b = norm_b != 0;
    const T per_a = has_a ? 1 / norm_a : T(1), per_b = has_b ? 1 / norm_b : T(1);
    const T ratio = (has_b ? norm_b : T(1)) / (has_a ? norm_a : T(1));  // of equal matrices 1, which leaves M = 0
    for (int64_t n = 0; n < tokens; ++n)
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            const T value = b[n * b_token + i];
            at.b[n * width + i] = value * per_b;
            at.m[n * width + i] = (a[n * a_token + i] * ratio - value) * per_b;
        }
    gram(at.m, at.m, at.k, width, tokens);
    gram(at.b, at.m, at.x_t, width, tokens);
    gram(at.b, at.b, at.c, width, tokens);

    const T *k = at.k, *x_t = at.x_t, *c = at.c;
    T *u = at.of_b, *v = at.of_m, t = 0, s = 0;  // u: X, then K + X; v: X^T + C
    for (int64_t i = 0; i < width; ++i)
        for (int64_t j = 0; j < width; ++j) u[i * width + j] = x_t[j * width + i];
    const T x_x_t = inner(u, x_t, products);
#pragma omp simd reduction(+ : t, s)
    for (int64_t i = 0; i < products; ++i) {
        t += x_t[i] * (x_t[i] + 2 * c[i]);
        s += k[i] * (k[i] + 4 * x_t[i] + 2 * c[i]);
        u[i] += k[i];
        v[i] = x_t[i] + c[i];
    }
    s += 2 * x_x_t;
    const T e = s + 2 * t, b4 = at_least(inner(at.c, at.c, products), T(1e-12));
    const T a2 = std::sqrt(at_least(b4 + e, T(1e-12))), b2 = std::sqrt(b4), difference = e / (a2 + b2);
    const T one_minus_cos = (s - t * difference / b2) / (a2 * (a2 + b2));
    const T far = has_a && has_b ? std::sqrt(at_least(2 * one_minus_cos, T(0))) : T(has_a != has_b);
    *distance = far;

    const T factor = has_a && has_b && far > 0 ? 2 / far * per_a : T(0);
    const T p = factor * (1 - one_minus_cos) / (a2 * a2);
    const T r = -factor * (difference + one_minus_cos * b2) / (a2 * a2 * b2);
#pragma omp simd
    for (int64_t i = 0; i < products; ++i) {
        const T from_u = p * u[i], from_v = v[i];
        v[i] = from_u + p * from_v;
        u[i] = from_u + r * from_v;
    }
    gradient(at.m, v, at.b, u, at.rows_of_block, grad, tokens, size, width);
}

template <typename T>
void dgd(Matrices<T> a, Matrices<T> b, T* distance, T* grad, int64_t images, int64_t heads, int64_t tokens,
         int64_t size, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch<T> scratch(tokens, size);
#pragma omp for
        for (int64_t index = 0; index < images * heads; ++index) {
            const int64_t image = index / heads, head = index % heads;
            distance_and_gradient(a.data + image * a.image + head * a.head, a.token,
                                  b.data + image * b.image + head * b.head, b.token, distance + index,
                                  grad + index * tokens * size, tokens, size, scratch);
        }
    }
}

}  // namespace

#define DEFINE(T, name)                                                                                              \
    void dgd_##name(const T* a, int64_t a_image, int64_t a_head, int64_t a_token, const T* b, int64_t b_image,       \
                    int64_t b_head, int64_t b_token, T* distance, T* grad, int64_t images, int64_t heads,            \
                    int64_t tokens, int64_t size, int threads) {                                                     \
        dgd<T>({a, a_image, a_head, a_token}, {b, b_image, b_head, b_token}, distance, grad, images, heads, tokens,  \
               size, threads);                                                                                       \
    }

extern "C" {
DEFINE(float, float32)
DEFINE(double, float64)
}
