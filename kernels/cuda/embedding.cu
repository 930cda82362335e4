// Embedding, and its gradient without atomics: the host sorts the tokens by word, and a block adds up those of one word.
// table: bf16 [words, width]; y, dy: bf16 [tokens, width]; d_table: f32 [words, width]. width is a multiple of 8.
// Bytes: 4 an element of y; backward 2 an element of dy and 8 one of d_table that is touched.
#include "block.cuh"

namespace {

constexpr int THREADS = 128;

// y = scale · the rows of the table. One block a token.
KERNEL __launch_bounds__(THREADS)
    embedding(bf16* y, const bf16* table, const int* tokens, int width, float scale) {
  const bf16* from = table + size_t(tokens[blockIdx.x]) * width;
  bf16* to = y + size_t(blockIdx.x) * width;
  for (int i = threadIdx.x * 8; i < width; i += THREADS * 8) {
    float values[8];
    load8(values, from + i);
#pragma unroll
    for (int k = 0; k < 8; k++) values[k] *= scale;
    store8(to + i, values);
  }
}

// d_table[words[b]] += scale · Σ dy[order[i]], i from starts[b] to starts[b + 1], in that order. A block for each word and 128 columns.
KERNEL __launch_bounds__(THREADS)
    embedding_backward(float* d_table, const bf16* dy, const int* words, const int* starts, const int* order, int width,
                       float scale) {
  const int column = blockIdx.y * THREADS + threadIdx.x;
  if (column >= width) return;
  float sum = 0;
  const int last = starts[blockIdx.x + 1];
  for (int i = starts[blockIdx.x]; i < last; i++) sum += to_float(dy[size_t(order[i]) * width + column]);
  d_table[size_t(words[blockIdx.x]) * width + column] += scale * sum;
}

}  // namespace

ENTRY(embedding)
ENTRY(embedding_backward)
