// What lies between the products: quantization, and the functions whose results are quantized in the same pass.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "integer_products.h"

namespace {

// An activation quantizer: u = round(clamp(x scale + shift, 0, levels)).
struct Quantizer {
  Buffer<float> scale, shift;
  float levels = 0;
};

inline int32_t quantize(float x, float scale, float shift, float levels) {
  float position = x * scale + shift;
  position = position > 0.f ? position : 0.f;
  position = position < levels ? position : levels;
  return int32_t(__builtin_rintf(position));
}

// Sets u[i] = code(i) for n codes. A second pass narrows them to bytes, because compilers vectorize two loops of one
// width each better than a loop of both.
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

// e^x for x <= 0, with a relative error below 1e-6. From -80 downwards it stays at e^-80, which is as good as 0 and not
// a denormal number: with those the processor is slow.
inline float exp_negative(float x) {
  x = x > -80.f ? x : -80.f;
  const float n = __builtin_rintf(x * 1.44269504f);
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;  // x - n ln 2, with ln 2 in two parts
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

// GELU, clipped as the network clips it. It takes 1 - erf(z) as e^(-z^2) times a polynomial in t = 1 / (1 + z / 2): the
// form of Abramowitz and Stegun (1964), 7.1.26, with two more terms. They were fitted for this project; in exact
// arithmetic the largest error is 1.2e-8.
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

// The LayerNorm of one row without its affine part: x -> (x - mean) / std; by default the identity.
struct Norm {
  float mean = 0.f, inverse = 1.f;
  Norm() = default;
  Norm(const float* x, int n, float eps) {
    float sum = 0.f, squares = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < n; ++c) sum += x[c];
    const float centre = sum / n;
#pragma omp simd reduction(+ : squares)
    for (int c = 0; c < n; ++c) squares += (x[c] - centre) * (x[c] - centre);
    mean = centre;
    inverse = 1.f / std::sqrt(squares / n + eps);
  }
  float operator()(float x) const { return (x - mean) * inverse; }
};

// Normalizes one row and quantizes it. The affine part of the LayerNorm is folded into the quantizer.
inline void norm_and_quantize(const float* x, int n, float eps, const float* scale, const float* shift, float levels,
                              uint8_t* u) {
  const Norm norm(x, n, eps);
  write_codes(n, u, [=](int c) { return quantize(norm(x[c]), scale[c], shift[c], levels); });
}

// Takes the softmax of a query's n scores, (sums - key_offset) score_scale, and quantizes it to u. Returns the sum of
// the codes. `scores` is memory for n floats.
inline int32_t softmax_and_quantize(const int32_t* sums, const int32_t* key_offset, int n, float score_scale,
                                    float* scores, float attn_scale, float attn_shift, float levels, uint8_t* u) {
  float highest = -INFINITY, total = 0.f;
#pragma omp simd reduction(max : highest)
  for (int j = 0; j < n; ++j) {
    scores[j] = float(sums[j] - key_offset[j]) * score_scale;
    highest = scores[j] > highest ? scores[j] : highest;
  }
#pragma omp simd reduction(+ : total)
  for (int j = 0; j < n; ++j) {
    scores[j] = exp_negative(scores[j] - highest);
    total += scores[j];
  }
  const float scale = attn_scale / total;
  const float* exponentials = scores;
  write_codes(n, u, [=](int j) { return quantize(exponentials[j], scale, attn_shift, levels); });
  int32_t code_sum = 0;
#pragma omp simd reduction(+ : code_sum)
  for (int j = 0; j < n; ++j) code_sum += u[j];
  return code_sum;
}

}  // namespace
