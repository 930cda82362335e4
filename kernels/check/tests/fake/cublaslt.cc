// libcublasLt.so.13 as far as Tunesmith calls it, without a GPU: a plain product of matrices that lie column by column. It refuses what
// the real one may not be asked: addresses that are less aligned than was said, other algorithms than its own, a workspace that is
// smaller than was said.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

enum Status { SUCCESS = 0, INVALID_VALUE = 7 };
enum Type { R_32F = 0, R_16BF = 14 };
enum { COMPUTE_32F = 68 };

struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t stride;
};
struct Description {
  int transposed[2];
};
struct Preference {
  uint64_t workspace;
  uint32_t scheme;
  uint32_t alignment[4];
};
// What an algorithm holds of its own: that it is one, the workspace, the alignments, how many were asked for before it.
struct Algorithm {
  uint64_t words[8];
};
struct Found {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
const uint64_t MAGIC = 0x54554e45;
uint64_t asked;

float number(const Layout& layout, const void* at, uint64_t row, uint64_t column) {
  uint64_t i = row + column * layout.stride;
  if (layout.type == R_32F) return static_cast<const float*>(at)[i];
  uint32_t bits = uint32_t(static_cast<const uint16_t*>(at)[i]) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
void set(const Layout& layout, void* at, uint64_t row, uint64_t column, float value) {
  uint64_t i = row + column * layout.stride;
  if (layout.type == R_32F) {
    static_cast<float*>(at)[i] = value;
    return;
  }
  uint32_t bits;
  memcpy(&bits, &value, 4);
  // To nearest, ties to even.
  static_cast<uint16_t*>(at)[i] = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

extern "C" {

size_t cublasLtGetVersion() { return getenv("FAKE_CUBLASLT") ? strtoull(getenv("FAKE_CUBLASLT"), nullptr, 10) : 130002; }
int cublasLtCreate(void** handle) {
  *handle = malloc(1);
  return SUCCESS;
}
int cublasLtDestroy(void* handle) {
  free(handle);
  return SUCCESS;
}
int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
  if (stride < int64_t(rows)) return INVALID_VALUE;
  *layout = new Layout{type, rows, columns, stride};
  return SUCCESS;
}
int cublasLtMatrixLayoutDestroy(Layout* layout) {
  delete layout;
  return SUCCESS;
}
int cublasLtMatmulDescCreate(Description** description, int compute, int scale) {
  if (compute != COMPUTE_32F || scale != R_32F) return INVALID_VALUE;
  *description = new Description{};
  return SUCCESS;
}
int cublasLtMatmulDescSetAttribute(Description* description, int attribute, const void* value, size_t bytes) {
  // TRANSA and TRANSB.
  if (bytes != 4 || (attribute != 3 && attribute != 4)) return INVALID_VALUE;
  memcpy(&description->transposed[attribute - 3], value, 4);
  return SUCCESS;
}
int cublasLtMatmulDescDestroy(Description* description) {
  delete description;
  return SUCCESS;
}
int cublasLtMatmulPreferenceCreate(Preference** preference) {
  *preference = new Preference{0, 7, {256, 256, 256, 256}};
  return SUCCESS;
}
int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value, size_t bytes) {
  if (attribute == 1 && bytes == 8) return memcpy(&preference->workspace, value, 8), SUCCESS;
  if (attribute == 3 && bytes == 4) return memcpy(&preference->scheme, value, 4), SUCCESS;
  if (attribute < 5 || attribute > 8 || bytes != 4) return INVALID_VALUE;
  memcpy(&preference->alignment[attribute - 5], value, 4);
  return SUCCESS;
}
int cublasLtMatmulPreferenceDestroy(Preference* preference) {
  delete preference;
  return SUCCESS;
}
int cublasLtMatmulAlgoGetHeuristic(void*, Description*, Layout*, Layout*, Layout*, Layout*, Preference* preference, int wanted,
                                   Found* found, int* count) {
  // Sums of bf16, or in whatever order, are not what was asked for.
  if (wanted < 1 || preference->scheme & ~2u) return INVALID_VALUE;
  *found = Found{};
  uint64_t alignments = 0;
  for (int i = 0; i < 4; i++) alignments |= uint64_t(preference->alignment[i] & 0xffff) << 16 * i;
  found->algorithm = {{MAGIC, preference->workspace, alignments, asked++}};
  found->workspace = preference->workspace;
  *count = 1;
  return SUCCESS;
}
int cublasLtMatmul(void*, Description* description, const float* alpha, const void* a, Layout* a_layout, const void* b,
                   Layout* b_layout, const float* beta, const void* c, Layout* c_layout, void* d, Layout* d_layout,
                   const Algorithm* algorithm, void* workspace, size_t bytes, void*) {
  if (!algorithm || algorithm->words[0] != MAGIC || !workspace || bytes < algorithm->words[1]) return INVALID_VALUE;
  const void* addresses[4] = {a, b, c, d};
  for (int i = 0; i < 4; i++) {
    uint64_t alignment = algorithm->words[2] >> 16 * i & 0xffff;
    if (!alignment || reinterpret_cast<uintptr_t>(addresses[i]) % alignment) return INVALID_VALUE;
  }
  auto [a_turned, b_turned] = description->transposed;
  uint64_t rows = a_turned ? a_layout->columns : a_layout->rows, sums = a_turned ? a_layout->rows : a_layout->columns;
  uint64_t columns = b_turned ? b_layout->rows : b_layout->columns;
  if (sums != (b_turned ? b_layout->columns : b_layout->rows) || d_layout->rows != rows || d_layout->columns != columns)
    return INVALID_VALUE;
  if (c_layout->rows != rows || c_layout->columns != columns || c_layout->type != d_layout->type) return INVALID_VALUE;
  for (uint64_t i = 0; i < rows; i++) {
    for (uint64_t j = 0; j < columns; j++) {
      float sum = 0;
      for (uint64_t k = 0; k < sums; k++)
        sum += number(*a_layout, a, a_turned ? k : i, a_turned ? i : k) * number(*b_layout, b, b_turned ? j : k, b_turned ? k : j);
      float before = *beta == 0 ? 0 : *beta * number(*c_layout, c, i, j);
      set(*d_layout, d, i, j, *alpha * sum + before);
    }
  }
  return SUCCESS;
}

}  // extern "C"
