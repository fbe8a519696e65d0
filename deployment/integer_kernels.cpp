// One forward of `integer.IntegerViT` on a CPU: every product in int8, every quantization in the pass that makes its
// input. native.py compiles this file and fills a Network through the C functions at its end.
//
// A thread takes an image, or with fewer images than threads some of its rows (tokens), through all the layers; only
// keys and values are read by the other threads of an image, so they meet once a block. A layer's input, all heads of
// an image and a strip of weights stay in the core's own cache.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define QVIT_AVX512_VNNI 1
#elif defined(__AVX2__)
#include <immintrin.h>
#define QVIT_AVX2 1
#endif

namespace {

constexpr int STRIP = 16;       // outputs that lie together in a packed matrix
constexpr int PANEL = 64;       // outputs of a tile, and the width of an attention head
constexpr int ROWS = 6;         // rows of a tile: 6 x 64 sums fill 24 of 32 vector registers
constexpr int GROUP = 4;        // products that one instruction adds up
constexpr int MAX_STRIPS = PANEL / STRIP;

int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T> class Buffer {  // zeros, aligned to a cache line
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

// --- products of codes -----------------------------------------------------------------------------------------------

// A packed matrix of K x N int8: strips of 16 columns, in a strip groups of 4 rows, in a group 4 bytes of each column.
size_t strip_bytes(int groups) { return size_t(groups) * STRIP * GROUP; }

inline int32_t four_codes(const uint8_t* codes) {
  int32_t four;
  std::memcpy(&four, codes, GROUP);
  return four;
}

#ifdef QVIT_AVX2

// R rows of a and one strip of b.
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
    // By way of 16 bits: the 8-bit multiplication of AVX2 saturates its sums, and codes may have 8 bits.
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

// out[r][16 z + c] = sum_k a[r][k] b[k][16 z + c] for R rows of a (uint8) and Z strips of b (int8).
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
  constexpr int MOST = 3;  // what 16 registers hold
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

struct Linear {  // sum_t scale_t (u weight_t^T - offset_t) + bias
  int inputs = 0, outputs = 0, terms = 0, groups = 0;
  Buffer<int8_t> weight;         // panel, term, strip, group, column, 4 rows
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

  // Calls take(row, count, panel, y) with y float [count][64] for every tile of `rows` rows.
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

// --- what lies between the products ----------------------------------------------------------------------------------

struct Quantizer {  // u = round(clamp(x scale + shift, 0, levels))
  Buffer<float> scale, shift;
  float levels = 0;
};

inline int32_t quantize(float x, float scale, float shift, float levels) {
  float position = x * scale + shift;
  position = position > 0.f ? position : 0.f;
  position = position < levels ? position : levels;
  return int32_t(__builtin_rintf(position));
}

// u[i] = code(i) for n codes; narrowed in a pass of its own, without which compilers mix the widths in one.
template <class Code> inline void write_codes(int n, uint8_t* u, const Code& code) {
  alignas(64) int32_t codes[PANEL];
  for (int first = 0; first < n; first += PANEL) {
    const int count = std::min(PANEL, n - first);
#pragma omp simd
    for (int i = 0; i < count; ++i) codes[i] = code(first + i);
#pragma omp simd
    for (int i = 0; i < count; ++i) u[first + i] = uint8_t(codes[i]);
  }
}

// e^x for x <= 0, relative error below 1e-6; as good as 0 from -80 downwards, and not a denormal number, which is slow.
inline float exp_negative(float x) {
  x = x > -80.f ? x : -80.f;
  const float n = __builtin_rintf(x * 1.44269504f);
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// GELU, clipped as the network does. 1 - erf(z) is e^(-z^2) times a polynomial in t = 1 / (1 + z / 2), the form of
// Abramowitz and Stegun (1964), 7.1.26, fitted here with two more terms: in exact arithmetic it errs by 1.2e-8 at most.
inline float clipped_gelu(float x) {
  const float z = std::fabs(x) * 0.70710678f;
  const float t = 1.f / (1.f + 0.5f * z);
  float p = 0.0588271964f;
  p = p * t - 0.218356541f;
  p = p * t + 0.122406003f;
  p = p * t + 0.307449254f;
  p = p * t + 0.130974806f;
  p = p * t + 0.321659389f;
  p = p * t + 0.277039905f;
  const float tail = p * t * exp_negative(-z * z);
  const float y = x > 0.f ? x - 0.5f * x * tail : 0.5f * x * tail;
  return y < 10.f ? y : 10.f;
}

// u = quantize((x - mean) / std) of one row; the affine part of the LayerNorm is folded into the quantizer.
inline void norm_and_quantize(const float* x, int n, float eps, const float* scale, const float* shift, float levels,
                              uint8_t* u) {
  float sum = 0.f, squares = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int c = 0; c < n; ++c) sum += x[c];
  const float mean = sum / n;
#pragma omp simd reduction(+ : squares)
  for (int c = 0; c < n; ++c) squares += (x[c] - mean) * (x[c] - mean);
  const float inverse = 1.f / std::sqrt(squares / n + eps);
  write_codes(n, u, [=](int c) { return quantize((x[c] - mean) * inverse, scale[c], shift[c], levels); });
}

struct Attention {  // constants of each head; zeros are z - qn
  Buffer<float> score_scale, q_zero, v_zero, attn_zero, out_scale;
};

struct Block {
  Quantizer attn_in, q, k, v, attn, proj_in, fc1_in, fc2_in;
  Linear qkv, proj, fc1, fc2;
  Attention heads;
};

struct Shape {
  int tokens, prefix, dim, depth, heads, hidden, classes, channels, height, width, patch_h, patch_w, rectified;
};

struct Epsilon {
  float norm1, norm2, norm, irm;
};

class Barrier {
  std::atomic<int> arrived_{0}, round_{0};
  const int size_;
 public:
  explicit Barrier(int size) : size_(size) {}
  void wait() {
    if (size_ == 1) return;
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.fetch_add(1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
      if (spins > 2000) std::this_thread::yield();
  }
};

struct Workspace {  // of one image
  Buffer<float> x;                           // (tokens, dim)
  Buffer<int32_t> key_offset[2];             // (heads, tokens): q_zero times the sum of a key's codes
  Buffer<uint8_t> codes, hidden, queries;    // (tokens, dim), (tokens, widest), (heads, tokens, 64)
  Buffer<int8_t> keys[2], values[2];         // packed, a head after the other; two, so that one can be read while the
                                             // next block's is written
};

struct Scratch {  // of one thread
  Buffer<int32_t> sums;                      // (rows of a tile, tokens in whole strips)
  Buffer<float> scores;                      // (tokens)
  Buffer<uint8_t> probabilities, ones;       // (rows of a tile, tokens in whole groups), (tokens in whole groups)
};

struct Network {
  Shape shape;
  Epsilon eps;
  std::vector<Block> blocks;
  Linear patch, head, head_dist;
  Quantizer patch_in, head_in, head_dist_in;
  Buffer<float> prefix, positions;

  int tiles() const { return round_up(shape.tokens, ROWS) / ROWS; }
  int key_strips() const { return round_up(shape.tokens, STRIP) / STRIP; }
  int value_groups() const { return round_up(shape.tokens, GROUP) / GROUP; }
  size_t key_bytes() const { return key_strips() * strip_bytes(PANEL / GROUP); }
  size_t value_bytes() const { return MAX_STRIPS * strip_bytes(value_groups()); }
  int widest() const { return std::max(round_up(shape.hidden, PANEL), patch.groups * GROUP); }  // whole panels

  Workspace workspace() const {
    const auto& [tokens, _p, dim, _d, heads, hidden, _c, _ch, _h, _w, _ph, _pw, _r] = shape;
    Workspace w;
    w.x = Buffer<float>(size_t(tokens) * dim);
    w.codes = Buffer<uint8_t>(size_t(tokens) * dim);
    w.hidden = Buffer<uint8_t>(size_t(tokens) * widest());
    w.queries = Buffer<uint8_t>(size_t(tokens) * dim);
    for (int i = 0; i < 2; ++i) {
      w.key_offset[i] = Buffer<int32_t>(size_t(heads) * tokens);
      w.keys[i] = Buffer<int8_t>(heads * key_bytes());
      w.values[i] = Buffer<int8_t>(heads * value_bytes());
    }
    return w;
  }

  Scratch scratch() const {
    const size_t groups = size_t(value_groups()) * GROUP, strips = size_t(key_strips()) * STRIP;
    Scratch s;
    s.sums = Buffer<int32_t>(ROWS * strips);
    s.scores = Buffer<float>(strips);
    s.probabilities = Buffer<uint8_t>(ROWS * groups);
    s.ones = Buffer<uint8_t>(groups);
    std::fill(s.ones + 0, s.ones + shape.tokens, uint8_t(1));
    return s;
  }

  void embed(Workspace& w, const float* image, int begin, int end) const {
    const int across = shape.width / shape.patch_w, dim = shape.dim;
    const size_t stride = widest();
    const int first = std::max(begin, shape.prefix);
    for (int token = begin; token < std::min(end, shape.prefix); ++token)
      std::memcpy(w.x + size_t(token) * dim, prefix + size_t(token) * dim, dim * sizeof(float));
    for (int token = first; token < end; ++token) {
      const int top = (token - shape.prefix) / across * shape.patch_h;
      const int left = (token - shape.prefix) % across * shape.patch_w;
      uint8_t* u = w.hidden + token * stride;
      for (int k = 0, c = 0; c < shape.channels; ++c)
        for (int i = 0; i < shape.patch_h; ++i, k += shape.patch_w) {
          const float* pixels = image + (size_t(c) * shape.height + top + i) * shape.width + left;
          const float *scale = patch_in.scale + k, *shift = patch_in.shift + k, levels = patch_in.levels;
          write_codes(shape.patch_w, u + k, [=](int j) { return quantize(pixels[j], scale[j], shift[j], levels); });
        }
    }
    if (first >= end) return;
    patch.tiles(w.hidden + first * stride, stride, end - first, [&](int row, int count, int panel, const float* y) {
      for (int r = 0; r < count; ++r) {
        const size_t at = size_t(first + row + r) * dim + panel * PANEL;
        for (int c = 0; c < PANEL; ++c)
          w.x[at + c] = y[r * PANEL + c] + positions[at - size_t(shape.prefix) * dim + c];
      }
    });
  }

  void queries_keys_values(const Block& b, Workspace& w, int which, int begin, int end) const {
    const int dim = shape.dim, heads = shape.heads, tokens = shape.tokens;
    for (int row = begin; row < end; ++row)
      norm_and_quantize(w.x + size_t(row) * dim, dim, eps.norm1, b.attn_in.scale, b.attn_in.shift, b.attn_in.levels,
                        w.codes + size_t(row) * dim);
    b.qkv.tiles(w.codes + size_t(begin) * dim, dim, end - begin, [&](int row, int count, int panel, const float* y) {
      const int part = panel / heads, head = panel % heads;
      const Quantizer& quantizer = part == 0 ? b.q : part == 1 ? b.k : b.v;
      const float *scale = quantizer.scale + head * PANEL, *shift = quantizer.shift + head * PANEL;
      const int centre = quantizer.levels > 127 ? 128 : 0;  // keys and values are the signed side of their products
      alignas(64) uint8_t u[PANEL];
      for (int r = 0; r < count; ++r, y += PANEL) {
        const int token = begin + row + r;
        if (part < 2 && shape.rectified)
          norm_and_quantize(y, PANEL, eps.irm, scale, shift, quantizer.levels, u);
        else
          write_codes(PANEL, u, [=, &quantizer](int d) {
            return quantize(y[d], scale[d], shift[d], quantizer.levels);
          });
        if (part == 0) {
          std::memcpy(w.queries + (size_t(head) * tokens + token) * PANEL, u, PANEL);
          continue;
        }
        int sum = 0;
        for (int d = 0; d < PANEL; ++d) {
          u[d] = uint8_t(u[d] - centre);
          sum += int8_t(u[d]);
        }
        if (part == 1) {
          int8_t* key = w.keys[which] + head * key_bytes() + token / STRIP * strip_bytes(PANEL / GROUP) +
                        token % STRIP * GROUP;
          for (int g = 0; g < PANEL / GROUP; ++g) std::memcpy(key + g * STRIP * GROUP, u + g * GROUP, GROUP);
          w.key_offset[which][size_t(head) * tokens + token] = int(b.heads.q_zero[head]) * sum;
        } else {
          int8_t* value = w.values[which] + head * value_bytes() + token / GROUP * STRIP * GROUP + token % GROUP;
          for (int d = 0; d < PANEL; ++d)
            value[d / STRIP * strip_bytes(value_groups()) + d % STRIP * GROUP] = int8_t(u[d]);
        }
      }
    });
  }

  void attend(const Block& b, Workspace& w, Scratch& s, int which, int begin, int end) const {
    const int dim = shape.dim, tokens = shape.tokens, strips = key_strips(), groups = value_groups();
    const int chunks = round_up(strips, MAX_STRIPS) / MAX_STRIPS;
    int32_t* sums = s.sums;
    float* scores = s.scores;
    uint8_t *probabilities = s.probabilities, *ones = s.ones;
    alignas(64) int32_t out[ROWS * PANEL], value_sums[PANEL];
    for (int head = 0; head < shape.heads; ++head) {
      const int8_t *keys = w.keys[which] + head * key_bytes(), *values = w.values[which] + head * value_bytes();
      const int32_t* key_offset = w.key_offset[which] + size_t(head) * tokens;
      const float score_scale = b.heads.score_scale[head], out_scale = b.heads.out_scale[head];
      const int attn_zero = int(b.heads.attn_zero[head]);
      const int value_zero = int(b.heads.v_zero[head]) - (b.v.levels > 127 ? 128 : 0);
      const float attn_scale = b.attn.scale[head], attn_shift = b.attn.shift[head];
      const float *proj_scale = b.proj_in.scale + head * PANEL, *proj_shift = b.proj_in.shift + head * PANEL;
      dot(1, MAX_STRIPS, ones, 0, values, groups, value_sums, PANEL);
      for (int row = begin; row < end; row += ROWS) {
        const int count = std::min(ROWS, end - row);
        const uint8_t* queries = w.queries + (size_t(head) * tokens + row) * PANEL;
        for (int chunk = 0; chunk < chunks; ++chunk) {
          const int first = strips * chunk / chunks, next = strips * (chunk + 1) / chunks;
          dot(count, next - first, queries, PANEL, keys + first * strip_bytes(PANEL / GROUP), PANEL / GROUP,
              sums + first * STRIP, strips * STRIP);
        }
        int32_t code_sums[ROWS];
        for (int r = 0; r < count; ++r) {
          const int32_t* sum = sums + size_t(r) * strips * STRIP;
          float highest = -INFINITY, total = 0.f;
#pragma omp simd reduction(max : highest)
          for (int j = 0; j < tokens; ++j) {
            scores[j] = float(sum[j] - key_offset[j]) * score_scale;
            highest = scores[j] > highest ? scores[j] : highest;
          }
#pragma omp simd reduction(+ : total)
          for (int j = 0; j < tokens; ++j) {
            scores[j] = exp_negative(scores[j] - highest);
            total += scores[j];
          }
          uint8_t* u = probabilities + size_t(r) * groups * GROUP;
          const float scale = attn_scale / total;
          const float *score = scores, levels = b.attn.levels;
          write_codes(tokens, u, [=](int j) { return quantize(score[j], scale, attn_shift, levels); });
          int32_t code_sum = 0;
#pragma omp simd reduction(+ : code_sum)
          for (int j = 0; j < tokens; ++j) code_sum += u[j];
          code_sums[r] = code_sum;
        }
        dot(count, MAX_STRIPS, probabilities, size_t(groups) * GROUP, values, groups, out, PANEL);
        for (int r = 0; r < count; ++r) {
          uint8_t* u = w.codes + size_t(row + r) * dim + head * PANEL;
          const int32_t of_row = value_zero * (attn_zero * tokens - code_sums[r]);
          const int32_t *sum = out + r * PANEL, *value_sum = value_sums;
          const float levels = b.proj_in.levels;
          write_codes(PANEL, u, [=](int d) {
            const int32_t product = sum[d] - attn_zero * value_sum[d] + of_row;
            return quantize(float(product) * out_scale, proj_scale[d], proj_shift[d], levels);
          });
        }
      }
    }
  }

  void add(const Linear& linear, const uint8_t* u, size_t stride, Workspace& w, int begin, int end) const {
    linear.tiles(u + begin * stride, stride, end - begin, [&](int row, int count, int panel, const float* y) {
      for (int r = 0; r < count; ++r) {
        float* x = w.x + size_t(begin + row + r) * shape.dim + panel * PANEL;
        for (int c = 0; c < PANEL; ++c) x[c] += y[r * PANEL + c];
      }
    });
  }

  void mlp(const Block& b, Workspace& w, int begin, int end) const {
    const int dim = shape.dim;
    const size_t stride = widest();
    for (int row = begin; row < end; ++row)
      norm_and_quantize(w.x + size_t(row) * dim, dim, eps.norm2, b.fc1_in.scale, b.fc1_in.shift, b.fc1_in.levels,
                        w.codes + size_t(row) * dim);
    b.fc1.tiles(w.codes + size_t(begin) * dim, dim, end - begin, [&](int row, int count, int panel, const float* y) {
      const float *scale = b.fc2_in.scale + panel * PANEL, *shift = b.fc2_in.shift + panel * PANEL;
      for (int r = 0; r < count; ++r) {
        uint8_t* u = w.hidden + (begin + row + r) * stride + panel * PANEL;
        const float *of_row = y + r * PANEL, levels = b.fc2_in.levels;
        write_codes(PANEL, u, [=](int c) { return quantize(clipped_gelu(of_row[c]), scale[c], shift[c], levels); });
      }
    });
    add(b.fc2, w.hidden, stride, w, begin, end);
  }

  void classify(Workspace& w, float* logits) const {
    for (int i = 0; i < 2; ++i) {
      const Quantizer& quantizer = i ? head_dist_in : head_in;
      norm_and_quantize(w.x + size_t(i) * shape.dim, shape.dim, eps.norm, quantizer.scale, quantizer.shift,
                        quantizer.levels, w.codes);
      (i ? head_dist : head).tiles(w.codes, shape.dim, 1, [&](int, int, int panel, const float* y) {
        for (int c = 0; c < PANEL && panel * PANEL + c < shape.classes; ++c)
          logits[panel * PANEL + c] = i ? (logits[panel * PANEL + c] + y[c]) / 2 : y[c];
      });
    }
  }

  // One thread's part of an image: `member` of a team that shares `w` and `barrier`.
  void image(Workspace& w, Scratch& s, Barrier& barrier, int member, int team, const float* pixels, float* logits) const {
    const int begin = std::min(shape.tokens, tiles() * member / team * ROWS);
    const int end = std::min(shape.tokens, tiles() * (member + 1) / team * ROWS);
    embed(w, pixels, begin, end);
    for (size_t i = 0; i < blocks.size(); ++i) {
      queries_keys_values(blocks[i], w, i % 2, begin, end);
      barrier.wait();
      attend(blocks[i], w, s, i % 2, begin, end);
      add(blocks[i].proj, w.codes, shape.dim, w, begin, end);
      mlp(blocks[i], w, begin, end);
    }
    if (member == 0) classify(w, logits);
    barrier.wait();  // the next image overwrites this one's keys and values
  }

  void forward(const float* images, int batch, int threads, float* logits) const {
    const int teams = std::max(1, std::min(batch, threads));
    const int team = std::max(1, std::min(threads / teams, tiles()));  // everyone has rows, the first those of the heads
    const size_t pixels = size_t(shape.channels) * shape.height * shape.width;
    std::vector<Workspace> spaces;
    std::vector<Scratch> scratches;
    std::vector<std::unique_ptr<Barrier>> barriers;
    for (int t = 0; t < teams; ++t) {
      spaces.push_back(workspace());
      barriers.push_back(std::make_unique<Barrier>(team));
    }
    for (int thread = 0; thread < teams * team; ++thread) scratches.push_back(scratch());
    enum { WAIT, GO, LEAVE };
    std::atomic<int> signal{WAIT};  // nobody may reach a barrier before all of the team exist
    const auto work = [&](int thread) {
      while (signal.load(std::memory_order_acquire) == WAIT) std::this_thread::yield();
      if (signal.load(std::memory_order_acquire) == LEAVE) return;
      const int t = thread % teams;
      for (int i = t; i < batch; i += teams)
        image(spaces[t], scratches[thread], *barriers[t], thread / teams, team, images + i * pixels,
              logits + size_t(i) * shape.classes);
    };
    std::vector<std::thread> others;
    others.reserve(teams * team);
    bool complete = true;
    try {
      for (int thread = 1; thread < teams * team; ++thread) others.emplace_back(work, thread);
    } catch (const std::system_error&) {  // the system has no more threads for us
      complete = false;
    }
    signal.store(complete ? GO : LEAVE, std::memory_order_release);
    if (complete) work(0);
    for (std::thread& other : others) other.join();
    if (!complete) forward(images, batch, 1, logits);
  }
};

}  // namespace

// --- for native.py: kinds are those of its tables LINEARS, QUANTIZERS and VECTORS ------------------------------------

namespace {

template <class Body> int status_of(const Body& body) {  // no exception may leave C functions
  try {
    body();
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

}  // namespace

extern "C" {

const char* qvit_instructions() {
#if defined(QVIT_AVX512_VNNI)
  return "AVX-512 VNNI";
#elif defined(QVIT_AVX2) && defined(__AVXVNNI__)
  return "AVX-VNNI";
#elif defined(QVIT_AVX2)
  return "AVX2";
#else
  return "portable";
#endif
}

void* qvit_new(const int32_t* shape, const float* eps) {
  Network* net = nullptr;
  const int failed = status_of([&] {
    auto made = std::make_unique<Network>();
    static_assert(sizeof(Shape) == 13 * sizeof(int32_t), "as native.py fills it");
    std::memcpy(&made->shape, shape, sizeof(Shape));
    std::memcpy(&made->eps, eps, sizeof(Epsilon));
    made->blocks.resize(made->shape.depth);
    net = made.release();
  });
  return failed ? nullptr : net;
}

void qvit_free(void* net) { delete static_cast<Network*>(net); }

int qvit_linear(void* handle, int block, int kind, int inputs, int outputs, int terms, const int8_t* weight,
                const float* scale, const int32_t* offset, const float* bias) {
  return status_of([&] {
    auto* net = static_cast<Network*>(handle);
    Linear* of_network[] = {&net->patch, &net->head, &net->head_dist};
    Linear* linear = of_network[block < 0 ? kind : 0];
    if (block >= 0) {
      Block& b = net->blocks[block];
      Linear* of_block[] = {&b.qkv, &b.proj, &b.fc1, &b.fc2};
      linear = of_block[kind];
    }
    linear->fill(inputs, outputs, terms, weight, scale, offset, bias);
  });
}

int qvit_quantizer(void* handle, int block, int kind, int size, int levels, const float* scale, const float* shift) {
  return status_of([&] {
    auto* net = static_cast<Network*>(handle);
    Quantizer* of_network[] = {&net->patch_in, &net->head_in, &net->head_dist_in};
    Quantizer* quantizer = of_network[block < 0 ? kind : 0];
    if (block >= 0) {
      Block& b = net->blocks[block];
      Quantizer* of_block[] = {&b.attn_in, &b.q, &b.k, &b.v, &b.attn, &b.proj_in, &b.fc1_in, &b.fc2_in};
      quantizer = of_block[kind];
    }
    quantizer->scale = Buffer<float>(scale, size, PANEL);
    quantizer->shift = Buffer<float>(shift, size, PANEL);
    quantizer->levels = float(levels);
  });
}

int qvit_vector(void* handle, int block, int kind, int size, const float* values) {
  return status_of([&] {
    auto* net = static_cast<Network*>(handle);
    Buffer<float>* of_network[] = {&net->prefix, &net->positions};
    Buffer<float>* vector = of_network[block < 0 ? kind : 0];
    if (block >= 0) {
      Attention& heads = net->blocks[block].heads;
      Buffer<float>* of_block[] = {&heads.score_scale, &heads.q_zero, &heads.v_zero, &heads.attn_zero,
                                   &heads.out_scale};
      vector = of_block[kind];
    }
    *vector = Buffer<float>(values, size);
  });
}

int qvit_forward(const void* net, const float* images, int batch, int threads, float* logits) {
  return status_of([&] { static_cast<const Network*>(net)->forward(images, batch, threads, logits); });
}

}  // extern "C"
