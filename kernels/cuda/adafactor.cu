// Adafactor (Shazeer and Stern, 2018) of one tensor, in transformers' order of operations. The running mean of squared gradients is kept
// for each row and each column of a matrix, or for each element of a vector.
//
// One step of a matrix [rows, width]: `adafactor_rows` and `adafactor_columns` (parts of rows, then their sum), `adafactor_mean` of the
// rows, `adafactor_squares` of the update and `adafactor_step_size` of its root mean square, `adafactor_matrix`. Of a vector:
// `adafactor_elements`, `adafactor_squares` with one row, `adafactor_step_size`, `adafactor_matrix` with one row.
// Parameters, gradients and means: f32 (gradients bf16 too). Sums are of f64, in an order that never changes. Bytes an element of a
// matrix: 4 gradients (or 2) four times, and 8 for the parameters.
#include "block.cuh"

namespace {

constexpr int THREADS = 256;

struct Totals {
  double parts[THREADS / 32];
};

// What all steps of a tensor have in common.
struct Adafactor {
  float kept, fresh, eps;             // of the running means
  float decay;                        // 1 − lr · weight decay
  double lr, clip_threshold;
};

// Of a step, and of a tensor's update.
struct StepState {
  double norm;
  float factor;
  unsigned finite;
};

__device__ __forceinline__ float square_of(float gradient, float factor, float eps) {
  const float scaled = gradient * factor;
  return scaled * scaled + eps;
}

// One block a row.
template <class T>
__device__ __forceinline__ void rows_of(float* row, const T* gradient, const StepState* state, const Adafactor& s,
                                        int width) {
  Totals& block = shared<Totals>();
  if (!state->finite) return;
  const T* from = gradient + size_t(blockIdx.x) * width;
  double sum = 0;
  for (int i = threadIdx.x; i < width; i += THREADS) sum += double(square_of(load1(from + i), state->factor, s.eps));
  sum = block_sum<THREADS>(sum, block.parts);
  if (threadIdx.x == 0) row[blockIdx.x] = row[blockIdx.x] * s.kept + float(sum / double(width)) * s.fresh;
}

// parts [blocks of rows, width]: a thread adds up one column of `rows_a_block` rows.
template <class T>
__device__ __forceinline__ void column_parts(double* parts, const T* gradient, const StepState* state,
                                             const Adafactor& s, int rows, int width, int rows_a_block) {
  const int column = blockIdx.x * THREADS + threadIdx.x;
  if (column >= width || !state->finite) return;
  const int first = blockIdx.y * rows_a_block, last = min(rows, first + rows_a_block);
  double sum = 0;
  for (int row = first; row < last; row++) {
    sum += double(square_of(load1(gradient + size_t(row) * width + column), state->factor, s.eps));
  }
  parts[size_t(blockIdx.y) * width + column] = sum;
}

KERNEL __launch_bounds__(THREADS)
    adafactor_columns(float* column_means, const double* parts, const StepState* state, Adafactor s, int count,
                      int rows, int width) {
  const int column = blockIdx.x * THREADS + threadIdx.x;
  if (column >= width || !state->finite) return;
  double sum = 0;
  for (int part = 0; part < count; part++) sum += parts[size_t(part) * width + column];
  column_means[column] = column_means[column] * s.kept + float(sum / double(rows)) * s.fresh;
}

// The mean of the rows' means. One block.
KERNEL __launch_bounds__(THREADS) adafactor_mean(float* mean, const float* row_means, int rows) {
  Totals& block = shared<Totals>();
  double sum = 0;
  for (int i = threadIdx.x; i < rows; i += THREADS) sum += double(row_means[i]);
  sum = block_sum<THREADS>(sum, block.parts);
  if (threadIdx.x == 0) *mean = float(sum / double(rows));
}

template <class T>
__device__ __forceinline__ void elements(float* means, const T* gradient, const StepState* state, const Adafactor& s,
                                         int count) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= count || !state->finite) return;
  means[i] = means[i] * s.kept + square_of(load1(gradient + i), state->factor, s.eps) * s.fresh;
}

// An element's update: the gradient times its row's factor and its column's. A vector is one row without a factor (row_means absent).
template <class T>
__device__ __forceinline__ float update_of(const T* gradient, const float* row_means, const float* mean,
                                           const float* column_means, int row, int column, size_t at, float factor) {
  const float of_row = row_means ? 1.0f / sqrtf(row_means[row] / *mean) : 1.0f;
  const float of_column = 1.0f / sqrtf(column_means[column]);
  return of_row * of_column * load1(gradient + at) * factor;
}

// Parts of Σ update²: one block a row.
template <class T>
__device__ __forceinline__ void squares_of(double* parts, const T* gradient, const float* row_means,
                                           const float* mean, const float* column_means, const StepState* state,
                                           int width) {
  Totals& block = shared<Totals>();
  const int row = blockIdx.x;
  double sum = 0;
  for (int i = threadIdx.x; i < width; i += THREADS) {
    const double update = double(
        update_of(gradient, row_means, mean, column_means, row, i, size_t(row) * width + i, state->factor));
    sum += update * update;
  }
  sum = block_sum<THREADS>(sum, block.parts);
  if (threadIdx.x == 0) parts[row] = sum;
}

// lr, less where the update's root mean square is above the threshold. One block.
KERNEL __launch_bounds__(THREADS)
    adafactor_step_size(float* step_size, const double* parts, Adafactor s, int rows, long long count) {
  Totals& block = shared<Totals>();
  double sum = 0;
  for (int i = threadIdx.x; i < rows; i += THREADS) sum += parts[i];
  sum = block_sum<THREADS>(sum, block.parts);
  if (threadIdx.x == 0) *step_size = float(s.lr / max(sqrt(sum / double(count)) / s.clip_threshold, 1.0));
}

// A block for 256 columns of a row.
template <class T>
__device__ __forceinline__ void apply(float* parameters, bf16* compute, const T* gradient, const float* row_means,
                                      const float* mean, const float* column_means, const float* step_size,
                                      const StepState* state, const Adafactor& s, int width) {
  const int row = blockIdx.y, column = blockIdx.x * THREADS + threadIdx.x;
  if (column >= width || !state->finite) return;
  const size_t at = size_t(row) * width + column;
  const float update = update_of(gradient, row_means, mean, column_means, row, column, at, state->factor);
  const float parameter = parameters[at] * s.decay - *step_size * update;
  parameters[at] = parameter;
  if (compute) compute[at] = to_bf16(parameter);
}

#define OF_GRADIENTS(suffix, T)                                                                                     \
  KERNEL __launch_bounds__(THREADS)                                                                                 \
      adafactor_rows_##suffix(float* row, const T* gradient, const StepState* state, Adafactor s, int width) {      \
    rows_of(row, gradient, state, s, width);                                                                        \
  }                                                                                                                 \
  KERNEL __launch_bounds__(THREADS)                                                                                 \
      adafactor_column_parts_##suffix(double* parts, const T* gradient, const StepState* state, Adafactor s,        \
                                      int rows, int width, int rows_a_block) {                                      \
    column_parts(parts, gradient, state, s, rows, width, rows_a_block);                                             \
  }                                                                                                                 \
  KERNEL __launch_bounds__(THREADS)                                                                                 \
      adafactor_elements_##suffix(float* means, const T* gradient, const StepState* state, Adafactor s,             \
                                  int count) {                                                                      \
    elements(means, gradient, state, s, count);                                                                     \
  }                                                                                                                 \
  KERNEL __launch_bounds__(THREADS)                                                                                 \
      adafactor_squares_##suffix(double* parts, const T* gradient, const float* row_means, const float* mean,       \
                                 const float* column_means, const StepState* state, int width) {                    \
    squares_of(parts, gradient, row_means, mean, column_means, state, width);                                       \
  }                                                                                                                 \
  KERNEL __launch_bounds__(THREADS)                                                                                 \
      adafactor_matrix_##suffix(float* parameters, bf16* compute, const T* gradient, const float* row_means,        \
                                const float* mean, const float* column_means, const float* step_size,               \
                                const StepState* state, Adafactor s, int width) {                                   \
    apply(parameters, compute, gradient, row_means, mean, column_means, step_size, state, s, width);                \
  }
OF_GRADIENTS(f32, float)
OF_GRADIENTS(bf16, bf16)

}  // namespace

ENTRY(adafactor_rows_f32)
ENTRY(adafactor_rows_bf16)
ENTRY(adafactor_column_parts_f32)
ENTRY(adafactor_column_parts_bf16)
ENTRY(adafactor_columns)
ENTRY(adafactor_mean)
ENTRY(adafactor_elements_f32)
ENTRY(adafactor_elements_bf16)
ENTRY(adafactor_squares_f32)
ENTRY(adafactor_squares_bf16)
ENTRY(adafactor_step_size)
ENTRY(adafactor_matrix_f32)
ENTRY(adafactor_matrix_bf16)
