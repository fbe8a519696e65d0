// The forward of `integer.IntegerViT`. Every product is one of int8, and every quantization happens in the pass that
// makes its input.
//
// A thread takes an image, or with fewer images than threads some of its rows (tokens), through all the layers. The
// other threads of an image read only its keys and values, so they meet once a block. A layer's input, all heads of an
// image and a strip of weights stay in the core's own cache.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include "integer_elementwise.h"
#include "integer_products.h"

namespace {

// Constants of each head. The zeros are the codes of 0, z - qn.
struct Attention {
  Buffer<float> score_scale, q_zero, v_zero, attn_zero, out_scale;
};

struct Block {
  Quantizer attn_in, q, k, v, attn, proj_in, fc1_in, fc2_in;
  Linear qkv, proj, fc1, fc2;
  Attention heads;
};

// Of `classifiers`, each reads the mean of the tokens from `first` to before `last`, the second of those one further on.
// `pools_first`: the last norm follows that mean. `pre_norm`: there is a norm of the embeddings.
struct Shape {
  int tokens, prefix, dim, depth, heads, hidden, classes, channels, height, width, patch_h, patch_w, rectified;
  int classifiers, first, last, pools_first, pre_norm;
};

struct Epsilon {
  float norm1, norm2, norm, irm, pre;
};

// Where the threads of an image wait for each other.
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

// What the threads of an image share.
struct Workspace {
  Buffer<float> x, pooled;                   // (tokens, dim), (dim)
  Buffer<int32_t> key_offset[2];             // (heads, tokens): q_zero times the sum of a key's codes
  Buffer<uint8_t> codes, hidden, queries;    // (tokens, dim), (tokens, widest), (heads, tokens, 64)
  Buffer<int8_t> keys[2], values[2];         // packed matrices, one head after the other. There are two, so that one
                                             // can be read while that of the next block is written
};

// What a thread has to itself.
struct Scratch {
  Buffer<int32_t> sums;                      // (rows of a tile, tokens in whole strips)
  Buffer<float> scores;                      // (tokens)
  Buffer<uint8_t> probabilities, ones;       // (rows of a tile, tokens in whole groups), (tokens in whole groups)
};

struct Network {
  Shape shape;
  Epsilon eps;
  std::vector<Block> blocks;
  Linear patch, heads[2];
  Quantizer patch_in, heads_in[2];
  Buffer<float> prefix, positions, pre_weight, pre_bias;

  int tiles() const { return round_up(shape.tokens, ROWS) / ROWS; }
  int key_strips() const { return round_up(shape.tokens, STRIP) / STRIP; }
  int value_groups() const { return round_up(shape.tokens, GROUP) / GROUP; }
  size_t key_bytes() const { return key_strips() * strip_bytes(PANEL / GROUP); }
  size_t value_bytes() const { return MAX_STRIPS * strip_bytes(value_groups()); }
  // The most codes that a row of an input has, in whole panels.
  int widest() const { return std::max(round_up(shape.hidden, PANEL), patch.groups * GROUP); }

  Workspace workspace() const {
    const int tokens = shape.tokens, dim = shape.dim, heads = shape.heads;
    Workspace w;
    w.x = Buffer<float>(size_t(tokens) * dim);
    w.pooled = Buffer<float>(dim);
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

  // Writes the embedded tokens: the prefix tokens as they are, the others as the product of an image's patches; and
  // normalizes them where there is such a norm.
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
    if (first < end) patch.tiles(w.hidden + first * stride, stride, end - first, [&](int row, int count, int panel, const float* y) {
      for (int r = 0; r < count; ++r) {
        const size_t at = size_t(first + row + r) * dim + panel * PANEL;
        for (int c = 0; c < PANEL; ++c)
          w.x[at + c] = y[r * PANEL + c] + positions[at - size_t(shape.prefix) * dim + c];
      }
    });
    for (int token = begin; token < end && shape.pre_norm; ++token) {
      float* x = w.x + size_t(token) * dim;
      const float *weight = pre_weight + 0, *bias = pre_bias + 0;
      const Norm norm(x, dim, eps.pre);
      for (int c = 0; c < dim; ++c) x[c] = norm(x[c]) * weight[c] + bias[c];
    }
  }

  // Normalizes the tokens and writes the codes of their queries, keys and values.
  void queries_keys_values(const Block& b, Workspace& w, int which, int begin, int end) const {
    const int dim = shape.dim, heads = shape.heads, tokens = shape.tokens;
    for (int row = begin; row < end; ++row)
      norm_and_quantize(w.x + size_t(row) * dim, dim, eps.norm1, b.attn_in.scale, b.attn_in.shift, b.attn_in.levels,
                        w.codes + size_t(row) * dim);
    b.qkv.tiles(w.codes + size_t(begin) * dim, dim, end - begin, [&](int row, int count, int panel, const float* y) {
      const int part = panel / heads, head = panel % heads;
      const Quantizer& quantizer = part == 0 ? b.q : part == 1 ? b.k : b.v;
      const float *scale = quantizer.scale + head * PANEL, *shift = quantizer.shift + head * PANEL;
      // Keys and values are the signed side of their products, so that codes above 127 are shifted by 128.
      const int centre = quantizer.levels > 127 ? 128 : 0;
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

  // Writes the codes of what attention gives, the input of proj, for the rows of all heads.
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
        for (int r = 0; r < count; ++r)
          code_sums[r] = softmax_and_quantize(sums + size_t(r) * strips * STRIP, key_offset, tokens, score_scale,
                                              scores, b.attn.scale[head], b.attn.shift[head], b.attn.levels,
                                              probabilities + size_t(r) * groups * GROUP);
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

  // Adds the output of a linear layer to the tokens.
  void add(const Linear& linear, const uint8_t* u, size_t stride, Workspace& w, int begin, int end) const {
    linear.tiles(u + begin * stride, stride, end - begin, [&](int row, int count, int panel, const float* y) {
      for (int r = 0; r < count; ++r) {
        float* x = w.x + size_t(begin + row + r) * shape.dim + panel * PANEL;
        for (int c = 0; c < PANEL; ++c) x[c] += y[r * PANEL + c];
      }
    });
  }

  // Adds the output of the MLP to the tokens.
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

  // Writes the codes of what a classifier reads.
  void pool(Workspace& w, int first, int last, const Quantizer& quantizer) const {
    const int dim = shape.dim;
    const float *scale = quantizer.scale + 0, *shift = quantizer.shift + 0, levels = quantizer.levels;
    if (last - first == 1)
      return norm_and_quantize(w.x + size_t(first) * dim, dim, eps.norm, scale, shift, levels, w.codes);
    float* pooled = w.pooled;
    std::fill(pooled, pooled + dim, 0.f);
    for (int token = first; token < last; ++token) {
      const float* x = w.x + size_t(token) * dim;
      const Norm norm = shape.pools_first ? Norm() : Norm(x, dim, eps.norm);
      for (int c = 0; c < dim; ++c) pooled[c] += norm(x[c]);
    }
    for (int c = 0; c < dim; ++c) pooled[c] /= last - first;
    if (shape.pools_first)
      norm_and_quantize(pooled, dim, eps.norm, scale, shift, levels, w.codes);
    else
      write_codes(dim, w.codes, [=](int c) { return quantize(pooled[c], scale[c], shift[c], levels); });
  }

  // Writes the mean of the classifiers' logits.
  void classify(Workspace& w, float* logits) const {
    for (int i = 0; i < shape.classifiers; ++i) {
      pool(w, shape.first + i, shape.last + i, heads_in[i]);
      heads[i].tiles(w.codes, shape.dim, 1, [&](int, int, int panel, const float* y) {
        for (int c = 0; c < PANEL && panel * PANEL + c < shape.classes; ++c)
          logits[panel * PANEL + c] = i ? (logits[panel * PANEL + c] + y[c]) / 2 : y[c];
      });
    }
  }

  // Computes one thread's part of an image, as the `member` of a team that shares `w` and `barrier`.
  void image(Workspace& w, Scratch& s, Barrier& barrier, int member, int team, const float* pixels,
             float* logits) const {
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
    if (shape.last - shape.first > 1) barrier.wait();  // it reads the tokens of all
    if (member == 0) classify(w, logits);
    barrier.wait();  // the next image overwrites this one's keys and values
  }

  // Computes a batch of images. Each team of threads takes every so many-th image.
  void forward(const float* images, int batch, int threads, float* logits) const {
    const int teams = std::max(1, std::min(batch, threads));
    // No team is larger than an image has tiles: every thread has rows, and the first of them those of the heads.
    const int team = std::max(1, std::min(threads / teams, tiles()));
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
    std::atomic<int> signal{WAIT};  // no thread may reach a barrier before all of its team exist
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
