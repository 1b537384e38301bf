// From [N, C, H, W] in memory to [N, H, W, C] and back, for callers whose tensors are not channels_last.
#pragma once
#include "common.h"

namespace minidamage {

// source [N, rows, columns] to target [N, columns, rows]. Work is counted in strips: strip s is matrix s / transpose_strips(rows), and
// TRANSPOSE_STRIP of its rows. cpu/layout.cpp; T is float or double.
constexpr int64_t TRANSPOSE_STRIP = 32;
inline int64_t transpose_strips(int64_t rows) { return ceil_div(rows, TRANSPOSE_STRIP); }
template <typename T>
void transpose_cpu(const T* source, T* target, int64_t rows, int64_t columns, int64_t begin, int64_t end);

}  // namespace minidamage
