// Transposing in squares that stay in the first-level cache: whole cache lines are read, and whole ones written. Read ../layout.h first.
#include "../layout.h"

#include <algorithm>

namespace minidamage {

template <typename T>
void transpose_cpu(const T* source, T* target, int64_t rows, int64_t columns, int64_t begin, int64_t end) {
  constexpr int64_t SIDE = TRANSPOSE_STRIP;
  const int64_t strips = transpose_strips(rows);
  T square[SIDE][SIDE];
  for (int64_t s = begin; s < end; ++s) {
    const int64_t row = s % strips * SIDE, height = std::min(SIDE, rows - row);
    const T* matrix = source + s / strips * rows * columns;
    T* transposed = target + s / strips * rows * columns;
    for (int64_t column = 0; column < columns; column += SIDE) {
      const int64_t width = std::min(SIDE, columns - column);
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; ++j) square[j][i] = matrix[(row + i) * columns + column + j];
      for (int64_t j = 0; j < width; ++j) std::copy(square[j], square[j] + height, transposed + (column + j) * rows + row);
    }
  }
}

template void transpose_cpu<float>(const float*, float*, int64_t, int64_t, int64_t, int64_t);
template void transpose_cpu<double>(const double*, double*, int64_t, int64_t, int64_t, int64_t);

}  // namespace minidamage
