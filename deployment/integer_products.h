// Products of integer codes: packed matrices, the product in the instructions of the processor, linear layers.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define QVIT_AVX512_VNNI 1
#elif defined(__AVX2__)
#include <immintrin.h>
#define QVIT_AVX2 1
#endif

namespace {

constexpr int STRIP = 16;       // so many outputs lie together in a packed matrix
constexpr int PANEL = 64;       // a tile has so many outputs, and an attention head is as wide
constexpr int ROWS = 6;         // a tile has so many rows: its 6 x 64 sums fill 24 of 32 vector registers
constexpr int GROUP = 4;        // one instruction adds up so many products
constexpr int MAX_STRIPS = PANEL / STRIP;

int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// An array that is aligned to a cache line, and zero where nothing was written.
template <class T> class Buffer {
  T* data_ = nullptr;
  size_t size_ = 0;
 public:
  Buffer() = default;
  explicit Buffer(size_t size) : size_(size) {
    const size_t bytes = (size * sizeof(T) + 63) / 64 * 64 + 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
    std::memset(data_, 0, bytes);
  }
  Buffer(const T* from, size_t size, int multiple = 1) : Buffer((size + multiple - 1) / multiple * multiple) {
    std::memcpy(data_, from, size * sizeof(T));
  }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() { std::free(data_); }
  operator T*() { return data_; }
  operator const T*() const { return data_; }
  size_t size() const { return size_; }
};

// --- products --------------------------------------------------------------------------------------------------------

// A packed matrix of K x N int8 consists of strips of 16 columns. A strip consists of groups of 4 rows, and a group
// holds 4 bytes of each column.
size_t strip_bytes(int groups) { return size_t(groups) * STRIP * GROUP; }

inline int32_t four_codes(const uint8_t* codes) {
  int32_t four;
  std::memcpy(&four, codes, GROUP);
  return four;
}

#ifdef QVIT_AVX2

// The product of R rows of a and one strip of b, as `dot` defines it.
template <int R>
void dot_strip(const uint8_t* a, size_t a_stride, const int8_t* b, int groups, int32_t* out, size_t out_stride) {
  __m256i sums[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
  for (int g = 0; g < groups; ++g, a += GROUP, b += STRIP * GROUP) {
    const auto* columns = reinterpret_cast<const __m256i*>(b);
#ifdef __AVXVNNI__
    const __m256i left = _mm256_load_si256(columns), right = _mm256_load_si256(columns + 1);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256i row = _mm256_set1_epi32(four_codes(a + r * a_stride));
      sums[r][0] = _mm256_dpbusd_avx_epi32(sums[r][0], row, left);
      sums[r][1] = _mm256_dpbusd_avx_epi32(sums[r][1], row, right);
    }
#else
    // It multiplies in 16 bits, because AVX2's 8-bit multiplication saturates its sums, and codes may have 8 bits.
    __m256i even[2], odd[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i column = _mm256_load_si256(columns + half);
      even[half] = _mm256_srai_epi16(_mm256_slli_epi16(column, 8), 8);
      odd[half] = _mm256_srai_epi16(column, 8);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256i row = _mm256_set1_epi32(four_codes(a + r * a_stride));
      const __m256i row_even = _mm256_and_si256(row, _mm256_set1_epi16(255)), row_odd = _mm256_srli_epi16(row, 8);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
        sums[r][half] = _mm256_add_epi32(sums[r][half], _mm256_add_epi32(_mm256_madd_epi16(row_even, even[half]),
                                                                         _mm256_madd_epi16(row_odd, odd[half])));
    }
#endif
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    for (int half = 0; half < 2; ++half)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * out_stride) + half, sums[r][half]);
}

#endif

// Computes out[r][16 z + c] = sum_k a[r][k] b[k][16 z + c] for R rows of a (uint8) and Z strips of b (int8).
template <int R, int Z>
void dot(const uint8_t* a, size_t a_stride, const int8_t* b, int groups, int32_t* out, size_t out_stride) {
  const size_t strip = strip_bytes(groups);
#ifdef QVIT_AVX512_VNNI
  __m512i sums[R][Z];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int z = 0; z < Z; ++z) sums[r][z] = _mm512_setzero_si512();
  for (int g = 0; g < groups; ++g) {
    __m512i column[Z];
#pragma GCC unroll 8
    for (int z = 0; z < Z; ++z) column[z] = _mm512_load_si512(b + z * strip + size_t(g) * STRIP * GROUP);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i row = _mm512_set1_epi32(four_codes(a + r * a_stride + size_t(g) * GROUP));
#pragma GCC unroll 8
      for (int z = 0; z < Z; ++z) sums[r][z] = _mm512_dpbusd_epi32(sums[r][z], row, column[z]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int z = 0; z < Z; ++z) _mm512_storeu_si512(out + r * out_stride + z * STRIP, sums[r][z]);
#elif defined(QVIT_AVX2)
#ifdef __AVXVNNI__
  constexpr int MOST = ROWS;
#else
  constexpr int MOST = 3;  // 16 registers hold the sums of so many rows
#endif
  for (int z = 0; z < Z; ++z) {
    dot_strip<(R < MOST ? R : MOST)>(a, a_stride, b + z * strip, groups, out + z * STRIP, out_stride);
    if constexpr (R > MOST)
      dot_strip<R - MOST>(a + MOST * a_stride, a_stride, b + z * strip, groups, out + MOST * out_stride + z * STRIP,
                          out_stride);
  }
#else
  typedef int32_t Lanes __attribute__((vector_size(STRIP * GROUP)));
  for (int z = 0; z < Z; ++z) {
    Lanes sums[R] = {};
    for (int g = 0; g < groups; ++g) {
      Lanes column, of_byte[GROUP];
      std::memcpy(&column, b + z * strip + size_t(g) * STRIP * GROUP, sizeof column);
      for (int k = 0; k < GROUP; ++k) of_byte[k] = (column << (24 - 8 * k)) >> 24;
      for (int r = 0; r < R; ++r)
        for (int k = 0; k < GROUP; ++k) sums[r] += of_byte[k] * int32_t(a[r * a_stride + size_t(g) * GROUP + k]);
    }
    for (int r = 0; r < R; ++r) std::memcpy(out + r * out_stride + z * STRIP, &sums[r], sizeof sums[r]);
  }
#endif
}

template <int R> void dot_of_rows(int strips, const uint8_t* a, size_t a_stride, const int8_t* b, int groups,
                                  int32_t* out, size_t out_stride) {
  switch (strips) {
    case 1: return dot<R, 1>(a, a_stride, b, groups, out, out_stride);
    case 2: return dot<R, 2>(a, a_stride, b, groups, out, out_stride);
    case 3: return dot<R, 3>(a, a_stride, b, groups, out, out_stride);
    default: return dot<R, 4>(a, a_stride, b, groups, out, out_stride);
  }
}

void dot(int rows, int strips, const uint8_t* a, size_t a_stride, const int8_t* b, int groups, int32_t* out,
         size_t out_stride) {
  switch (rows) {
    case 1: return dot_of_rows<1>(strips, a, a_stride, b, groups, out, out_stride);
    case 2: return dot_of_rows<2>(strips, a, a_stride, b, groups, out, out_stride);
    case 3: return dot_of_rows<3>(strips, a, a_stride, b, groups, out, out_stride);
    case 4: return dot_of_rows<4>(strips, a, a_stride, b, groups, out, out_stride);
    case 5: return dot_of_rows<5>(strips, a, a_stride, b, groups, out, out_stride);
    default: return dot_of_rows<ROWS>(strips, a, a_stride, b, groups, out, out_stride);
  }
}

// --- linear layers ---------------------------------------------------------------------------------------------------

// A linear layer of codes u: sum_t scale_t (u weight_t^T - offset_t) + bias.
struct Linear {
  int inputs = 0, outputs = 0, terms = 0, groups = 0;
  Buffer<int8_t> weight;         // in the order panel, term, strip, group, column, 4 rows
  Buffer<float> scale, bias;     // (terms, padded outputs), (padded outputs)
  Buffer<int32_t> offset;        // (terms, padded outputs)

  int padded() const { return round_up(outputs, PANEL); }

  void fill(int inputs_, int outputs_, int terms_, const int8_t* codes, const float* scales, const int32_t* offsets,
            const float* biases) {
    inputs = inputs_, outputs = outputs_, terms = terms_, groups = round_up(inputs, GROUP) / GROUP;
    weight = Buffer<int8_t>(size_t(terms) * padded() * groups * GROUP);
    scale = Buffer<float>(size_t(terms) * padded());
    offset = Buffer<int32_t>(size_t(terms) * padded());
    bias = Buffer<float>(padded());
    std::memcpy(bias, biases, outputs * sizeof(float));
    for (int t = 0; t < terms; ++t) {
      std::memcpy(scale + size_t(t) * padded(), scales + size_t(t) * outputs, outputs * sizeof(float));
      std::memcpy(offset + size_t(t) * padded(), offsets + size_t(t) * outputs, outputs * sizeof(int32_t));
      for (int n = 0; n < outputs; ++n)
        for (int k = 0; k < inputs; ++k)
          panel(n / PANEL, t)[(n % PANEL) / STRIP * strip_bytes(groups) + (k / GROUP * STRIP + n % STRIP) * GROUP +
                              k % GROUP] = codes[(size_t(t) * outputs + n) * inputs + k];
    }
  }
  int8_t* panel(int p, int term) { return weight + (size_t(p) * terms + term) * PANEL * groups * GROUP; }
  const int8_t* panel(int p, int term) const { return const_cast<Linear*>(this)->panel(p, term); }

  // Computes the layer for `rows` rows, tile by tile: calls take(row, count, panel, y) with each, y float [count][64].
  template <class Take> void tiles(const uint8_t* u, size_t stride, int rows, const Take& take) const {
    alignas(64) int32_t sums[ROWS * PANEL];
    alignas(64) float y[ROWS * PANEL];
    for (int p = 0; p < padded() / PANEL; ++p)
      for (int row = 0; row < rows; row += ROWS) {
        const int count = std::min(ROWS, rows - row);
        for (int t = 0; t < terms; ++t) {
          dot(count, MAX_STRIPS, u + row * stride, stride, panel(p, t), groups, sums, PANEL);
          const float* s = scale + size_t(t) * padded() + p * PANEL;
          const int32_t* o = offset + size_t(t) * padded() + p * PANEL;
          const float* b = bias + p * PANEL;
          for (int r = 0; r < count; ++r)
            for (int c = 0; c < PANEL; ++c)
              y[r * PANEL + c] = (t ? y[r * PANEL + c] : b[c]) + float(sums[r * PANEL + c] - o[c]) * s[c];
        }
        take(row, count, p, static_cast<const float*>(y));
      }
  }
};

}  // namespace
