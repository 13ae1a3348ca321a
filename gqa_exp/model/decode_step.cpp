// A whole decode step: the kernels of its products and of its attention, one after the other.
//
// It computes nothing itself, so it serves every number format that they serve. Called one by one from Python they wait
// for it: at batch 1, a step of `mini` took 0.49 ms so, and takes 0.16. `decode_step.py` fills these structs.

#include <cstring>

namespace {

struct Product {               // see decode_linear.cpp
  const void *norm, *weights;  // norm: null for none
  long inputs, outputs, gated;
  float epsilon;
};

struct Cache {
  char *keys, *values;  // (batch, KV heads, capacity, head_dim)
  long capacity;
};

struct Layer {
  Product qkv, o, cross_q, cross_o, wi, wo;
  Cache own, cross;
  long kv_heads;
};

struct Bias {
  const void* scores;  // null for none
  long batch, head;    // elements between sequences, and between query heads
};

struct Step {
  int (*multiply)(const void* x, const void* norm, const void* weights, const void* residual, void* y,
                  const long* sizes, float epsilon);
  void (*attend)(const void* q, const void* k, const void* v, const void* bias, void* out, const long* sizes);
  const Layer* layers;
  long depth;
  Product lm_head;
  Bias mask;  // of cross-attention
  long batch, heads, head_dim, head_bytes;
  // To work in. queries: (batch, outputs of the product before), of self-attention (heads + 2 KV heads) head_dim; mixed:
  // (batch, heads, head_dim); hidden: (batch, d_ff).
  char *queries, *mixed, *hidden;

  // norm(x) W^T, gated, plus `y` if added; 0, or 1 where there was no memory.
  int multiply_with(const Product& product, const void* x, void* y, bool added = false) const {
    const long sizes[] = {batch, product.inputs, product.outputs, product.gated};
    return multiply(x, product.norm, product.weights, added ? y : nullptr, y, sizes, product.epsilon);
  }

  // From `queries`, `width` elements a sequence, to `mixed`.
  void attend_to(const Cache& cache, long kv_heads, long end, long width, const Bias& bias) const {
    const long group = heads / kv_heads, head = cache.capacity * head_dim;
    const long sizes[] = {batch, kv_heads, group, end, width, head, bias.batch, group * bias.head, bias.head};
    attend(queries, cache.keys, cache.values, bias.scores, mixed, sizes);
  }

  // The new keys and values, which lie behind the queries of each sequence.
  void store(const Cache& cache, long kv_heads, long position) const {
    for (long pair = 0; pair < batch * kv_heads; ++pair) {
      const char* key = queries + (pair / kv_heads * (heads + 2 * kv_heads) + heads + pair % kv_heads) * head_bytes;
      const long at = (pair * cache.capacity + position) * head_bytes;
      std::memcpy(cache.keys + at, key, head_bytes);
      std::memcpy(cache.values + at, key + kv_heads * head_bytes, head_bytes);
    }
  }

  int run(char* x, long position, const Bias& bias, void* logits) const {
    int failed = 0;
    for (const Layer* layer = layers; layer < layers + depth; ++layer) {
      failed |= multiply_with(layer->qkv, x, queries);
      store(layer->own, layer->kv_heads, position);
      attend_to(layer->own, layer->kv_heads, position + 1, layer->qkv.outputs, bias);
      failed |= multiply_with(layer->o, mixed, x, true);
      failed |= multiply_with(layer->cross_q, x, queries);
      attend_to(layer->cross, layer->kv_heads, layer->cross.capacity, layer->cross_q.outputs, mask);
      failed |= multiply_with(layer->cross_o, mixed, x, true);
      failed |= multiply_with(layer->wi, x, hidden);
      failed |= multiply_with(layer->wo, hidden, x, true);
    }
    return failed | multiply_with(lm_head, x, logits);
  }
};

}  // namespace

// x: the embedded tokens (batch, d_model), which is written to; bias: of self-attention, (heads, position + 1),
// `bias_head` elements between heads. Returns 1 where there was no memory for the inputs of a product.
extern "C" int decode_step(const Step* step, char* x, long position, const void* bias, long bias_head, void* logits) {
  return step->run(x, position, {bias, 0, bias_head}, logits);
}
