// Optimizers over a flat store of parameters, in torch's order of operations; each element is read and written once.
//
// The gradient's norm and finiteness come first: `squares` leaves f64 parts of Σ grad² in an order that never changes, and a flag;
// `gradient_scale` makes of them the factor of the update, 0 where it must not be made. Parameters and moments: f32 [count];
// gradients: f32 or bf16. `compute`, where there is one, takes the parameters rounded to bf16.
// Bytes an element: squares 4 (2 for bf16); AdamW 28 + 2; in 8 bits 16 + 2.
#include "block.cuh"
#include "map.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int STATE_BLOCK = 256;  // values of a state in 8 bits that share a scale

struct Totals {
  double parts[THREADS / 32];
};

// A block sums `per_block` elements, a multiple of its threads.
template <class T>
__device__ __forceinline__ void sum_squares(double* parts, const T* gradient, long long count, int per_block) {
  Totals& block = shared<Totals>();
  const long long first = blockIdx.x * (long long)per_block;
  double sum = 0;
  for (int k = threadIdx.x; k < per_block; k += THREADS) {
    if (first + k >= count) break;
    const double value = double(load1(gradient + first + k));
    sum += value * value;
  }
  sum = block_sum<THREADS>(sum, block.parts);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
KERNEL __launch_bounds__(THREADS)
    squares_f32(double* parts, const float* gradient, long long count, int per_block) {
  sum_squares(parts, gradient, count, per_block);
}
KERNEL __launch_bounds__(THREADS)
    squares_bf16(double* parts, const bf16* gradient, long long count, int per_block) {
  sum_squares(parts, gradient, count, per_block);
}

struct StepState {
  double norm;      // of the gradient, times `scale`
  float factor;     // of the gradient in the update
  unsigned finite;  // whether the update is made
};

// One block. The gradient is `scale` times what is stored, and is scaled down to `max_norm` where that is above 0.
KERNEL __launch_bounds__(THREADS)
    gradient_scale(StepState* state, const double* parts, int count, double scale, double max_norm) {
  Totals& block = shared<Totals>();
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += THREADS) sum += parts[i];
  sum = block_sum<THREADS>(sum, block.parts);
  if (threadIdx.x) return;
  const double norm = sqrt(sum) * scale;
  const bool finite = norm - norm == 0;
  // As torch's clip_grad_norm_ has it.
  const double clip = max_norm > 0 ? min(max_norm / (norm + 1e-6), 1.0) : 1.0;
  state->norm = norm;
  state->factor = finite ? float(scale * clip) : 0.0f;
  state->finite = finite;
}

// What all elements of a step have in common.
struct AdamW {
  float decay, beta2, new1, new2, correction2, step_size, eps;
};

__device__ __forceinline__ void update(float& parameter, float gradient, float& m, float& v, const AdamW& s) {
  parameter *= s.decay;
  m += (gradient - m) * s.new1;
  v = v * s.beta2 + s.new2 * gradient * gradient;
  parameter -= s.step_size * (m / (sqrtf(v) / s.correction2 + s.eps));
}

template <class T>
__device__ __forceinline__ void adamw(float* parameters, bf16* compute, const T* gradient, float* m, float* v,
                                      const StepState* state, const AdamW& s, long long count) {
  const long long i = blockIdx.x * (long long)THREADS + threadIdx.x;
  if (i >= count || !state->finite) return;
  float parameter = parameters[i], first = m[i], second = v[i];
  update(parameter, load1(gradient + i) * state->factor, first, second, s);
  parameters[i] = parameter, m[i] = first, v[i] = second;
  if (compute) compute[i] = to_bf16(parameter);
}
KERNEL __launch_bounds__(THREADS)
    adamw_f32(float* parameters, bf16* compute, const float* gradient, float* m, float* v, const StepState* state,
              AdamW s, long long count) {
  adamw(parameters, compute, gradient, m, v, state, s, count);
}
KERNEL __launch_bounds__(THREADS)
    adamw_bf16(float* parameters, bf16* compute, const bf16* gradient, float* m, float* v, const StepState* state,
               AdamW s, long long count) {
  adamw(parameters, compute, gradient, m, v, state, s, count);
}

struct States {
  float signed_map[256], unsigned_map[256];
  float parts[THREADS / 32];
};

// Moments in 8 bits of a dynamic map, in blocks of 256 with a scale each: one block of threads for each.
template <class T>
__device__ __forceinline__ void adamw_8bit(float* parameters, bf16* compute, const T* gradient, uint8_t* m,
                                           float* m_absmax, uint8_t* v, float* v_absmax, const float* maps,
                                           const StepState* state, const AdamW& s, long long count) {
  States& block = shared<States>();
  if (!state->finite) return;
  block.signed_map[threadIdx.x] = maps[threadIdx.x];
  block.unsigned_map[threadIdx.x] = maps[256 + threadIdx.x];
  __syncthreads();
  const long long i = blockIdx.x * (long long)STATE_BLOCK + threadIdx.x;
  const bool is_there = i < count;
  float parameter = 0, first = 0, second = 0;
  if (is_there) {
    parameter = parameters[i];
    first = block.signed_map[m[i]] * m_absmax[blockIdx.x];
    second = block.unsigned_map[v[i]] * v_absmax[blockIdx.x];
    update(parameter, load1(gradient + i) * state->factor, first, second, s);
    parameters[i] = parameter;
    if (compute) compute[i] = to_bf16(parameter);
  }
  // Whoever reads a scale has done so before the barriers of these.
  const float most_first = block_max<THREADS>(fabsf(first), block.parts);
  const float most_second = block_max<THREADS>(fabsf(second), block.parts);
  if (threadIdx.x == 0) m_absmax[blockIdx.x] = most_first, v_absmax[blockIdx.x] = most_second;
  if (!is_there) return;
  m[i] = uint8_t(nearest_in_map(block.signed_map, most_first > 0 ? first / most_first : 0.0f));
  const uint32_t found = nearest_in_map(block.unsigned_map, most_second > 0 ? second / most_second : 0.0f);
  // Only zero becomes zero: a second moment that vanished under a first one that did not would divide it by eps.
  v[i] = uint8_t(second > 0 ? max(found, 1u) : found);
}
KERNEL __launch_bounds__(THREADS)
    adamw_8bit_f32(float* parameters, bf16* compute, const float* gradient, uint8_t* m, float* m_absmax, uint8_t* v,
                   float* v_absmax, const float* maps, const StepState* state, AdamW s, long long count) {
  adamw_8bit(parameters, compute, gradient, m, m_absmax, v, v_absmax, maps, state, s, count);
}
KERNEL __launch_bounds__(THREADS)
    adamw_8bit_bf16(float* parameters, bf16* compute, const bf16* gradient, uint8_t* m, float* m_absmax, uint8_t* v,
                    float* v_absmax, const float* maps, const StepState* state, AdamW s, long long count) {
  adamw_8bit(parameters, compute, gradient, m, m_absmax, v, v_absmax, maps, state, s, count);
}

// Momentum is absent where it is 0.
struct Sgd {
  float lr, decay, kept;
};

template <class T>
__device__ __forceinline__ void sgd(float* parameters, bf16* compute, const T* gradient, float* momentum,
                                    const StepState* state, const Sgd& s, long long count) {
  const long long i = blockIdx.x * (long long)THREADS + threadIdx.x;
  if (i >= count || !state->finite) return;
  float parameter = parameters[i];
  float direction = load1(gradient + i) * state->factor + s.decay * parameter;
  if (momentum) {
    direction = s.kept * momentum[i] + direction;
    momentum[i] = direction;
  }
  parameter -= s.lr * direction;
  parameters[i] = parameter;
  if (compute) compute[i] = to_bf16(parameter);
}
KERNEL __launch_bounds__(THREADS)
    sgd_f32(float* parameters, bf16* compute, const float* gradient, float* momentum, const StepState* state, Sgd s,
            long long count) {
  sgd(parameters, compute, gradient, momentum, state, s, count);
}
KERNEL __launch_bounds__(THREADS)
    sgd_bf16(float* parameters, bf16* compute, const bf16* gradient, float* momentum, const StepState* state, Sgd s,
             long long count) {
  sgd(parameters, compute, gradient, momentum, state, s, count);
}

}  // namespace

ENTRY(squares_f32)
ENTRY(squares_bf16)
ENTRY(gradient_scale)
ENTRY(adamw_f32)
ENTRY(adamw_bf16)
ENTRY(adamw_8bit_f32)
ENTRY(adamw_8bit_bf16)
ENTRY(sgd_f32)
ENTRY(sgd_bf16)
