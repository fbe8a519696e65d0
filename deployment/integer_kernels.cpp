// The C functions by which native.py fills a Network and runs it. The kinds of its parts are their places in the tables
// LINEARS, QUANTIZERS and VECTORS of native.py; block is -1 for the parts of the network itself.

#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>

#include "integer_network.h"

namespace {

// 0, or 1 after an exception, because none may leave a C function.
template <class Body> int status_of(const Body& body) {
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
    static_assert(sizeof(Shape) == 18 * sizeof(int32_t), "as native.py fills it");
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
    Linear* of_network[] = {&net->patch, &net->heads[0], &net->heads[1]};
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
    Quantizer* of_network[] = {&net->patch_in, &net->heads_in[0], &net->heads_in[1]};
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
    Buffer<float>* of_network[] = {&net->prefix, &net->positions, &net->pre_weight, &net->pre_bias};
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
