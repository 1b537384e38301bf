// Linear attention on the CPU: the plain form of ../cuda/linear_attention.cu. Read ../linear_attention.h, then ../gemm.h.
//
// All of it is matrix products, so all of it runs at the micro-kernel's speed if the operands are near. A work item is one head of one
// picture and a segment of rows: it packs its K and V once and walks over tiles of rows; scores, exponentials and their product with V
// stay in the cache. N d numbers are read and N d written, the N k scores go nowhere.
// Backward recomputes a tile's scores, which costs one of its five products and saves N k numbers.
//
// Measured on one core of an AMD EPYC with AVX-512, float32, processor time, others at work beside it, before a number was broadcast by
// its load (gemm.h; on a Xeon that took a third off): the micro-kernel reaches 180 to 240 GFLOP/s on operands in the cache (257 is what
// registers alone allow), the framework's product 70 to 115. B = 2, N = 3,136, D = 256, 8 heads, k = 64: forward 13.3 ms, the same steps
// from linear, matmul and scaled_dot_product_attention 27.7; with backward 40.8 and 73.4. k = 256: 29.2 and 53.6; 85 and 176. The order of
// the paper, K and V of length N first, costs 1.3 to 1.8 times as much again.
#include "../linear_attention.h"

#include <algorithm>
#include <cmath>

#include "../gemm.h"

namespace minidamage {
namespace {

constexpr int64_t PRODUCT_COLUMNS = 128;  // of a block of a product
constexpr int64_t PRODUCT_ROWS = 512;

// exp(x), for x up to 88: 2^n exp(r) with x = n log 2 + r and a polynomial for exp(r) (Cephes expf, 2 ulp); 0 below -87. NaN stays.
inline FloatVector exponential(FloatVector x) {
  const FloatVector zero = {}, magic = broadcast(12582912.f);  // 1.5 x 2^23: the sum has the rounded integer in its last bits
  const FloatVector shifted = multiply_add(x, broadcast(1.44269504f), magic), n = shifted - magic;
  const FloatVector r = multiply_add(n, broadcast(2.12194440e-4f), multiply_add(n, broadcast(-0.693359375f), x));
  FloatVector y = broadcast(1.9875691500e-4f);
  for (const float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.f, 1.f})
    y = multiply_add(y, r, broadcast(coefficient));
  typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
  const Bits power = (reinterpret_cast<Bits>(shifted) - 0x4B400000u + 127u) << 23;
  y *= reinterpret_cast<FloatVector>(power);
  return x < broadcast(-87.f) ? zero : y;
}
inline DoubleVector exponential(DoubleVector x) {
  for (int i = 0; i < VECTOR_LANES<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// Rows of a tile of scores: k numbers, filled up to whole panels, kept off the distances at which a cache's sets repeat.
template <typename T>
int64_t row_size(int64_t k) {
  const int64_t filled = (k + NR<T> - 1) / NR<T> * NR<T>;
  return filled * sizeof(T) % 1024 == 0 ? filled + VECTOR_LANES<T> : filled;
}

// a . b of d numbers
template <typename T>
T dot(const T* a, const T* b, int64_t d) {
  vector_t<T> sums = {};
  int64_t c = 0;
  for (; c + VECTOR_LANES<T> <= d; c += VECTOR_LANES<T>) sums = multiply_add(load_vector(a + c), load_vector(b + c), sums);
  T sum = sum_of_vector<T>(sums);
  for (; c < d; ++c) sum += a[c] * b[c];
  return sum;
}

// The k scores of a vector's worth of queries, vectors `step` numbers apart: they become exp(scores - largest), without the division.
// Returns their sums, and the largest.
template <typename T>
vector_t<T> exponentials_of_queries(T* scores, int64_t k, int64_t step, vector_t<T>& largest) {
  using Vector = vector_t<T>;
  largest = load_vector(scores);
  for (int64_t j = 1; j < k; ++j) {
    const Vector score = load_vector(scores + j * step);
    largest = largest > score ? largest : score;  // a NaN may be lost here: its exponential is not
  }
  Vector sums = {};
  for (int64_t j = 0; j < k; ++j) {
    const Vector power = exponential(load_vector(scores + j * step) - largest);
    store_vector(scores + j * step, power);
    sums += power;
  }
  return sums;
}

// scores and grad_P [k]: in place P = exp(scores - log_sum_exp) and dS = P (grad_P - mean).
template <typename T>
void grad_of_row(T* scores, T* grad_P, int64_t k, T log_sum_exp, T mean) {
  for (int64_t j = 0; j < k; j += VECTOR_LANES<T>) {
    const vector_t<T> P = exponential(load_vector(scores + j) - log_sum_exp);
    store_vector(scores + j, P);
    store_vector(grad_P + j, P * (load_vector(grad_P + j) - mean));
  }
}

// target [rows, d], contiguous, = source [rows, d] times scale, its rows `row` apart.
template <typename T>
void copy_rows(const T* source, int64_t row, int64_t rows, int64_t d, T scale, T* target) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < d; ++c) target[i * d + c] = source[i * row + c] * scale;
}

// The rows of segment s.
inline int64_t segment_begin(int64_t N, int64_t segments, int64_t s) { return N / segments * s + std::min(s, N % segments); }

// What the items of one thread work in.
template <typename T>
class Workspace {
 public:
  T* take(int64_t count) {
    pieces.emplace_back(count + VECTOR_LANES<T>);
    return pieces.back().data();
  }

 private:
  std::vector<std::vector<T>> pieces;
};

}  // namespace

template <typename T>
int64_t product_blocks(const Product<T>& product) {
  return ceil_div(product.M, PRODUCT_ROWS) * ceil_div(product.N, PRODUCT_COLUMNS);
}

template <typename T>
void product_cpu(const Product<T>& product, int64_t begin, int64_t end) {
  const int64_t down = ceil_div(product.M, PRODUCT_ROWS);
  std::vector<T> scratch;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t i0 = segment_begin(product.M, down, block % down), i1 = segment_begin(product.M, down, block % down + 1);
    const int64_t j0 = block / down * PRODUCT_COLUMNS, columns = std::min(PRODUCT_COLUMNS, product.N - j0);
    bool accumulate = false;
    for (const ProductTerm<T>& term : product.terms) {
      const Strided<T> A = {term.A, term.A_row, term.A_column}, B = {term.B, term.B_row, term.B_column};
      gemm(i1 - i0, columns, term.K, A.from(i0, 0), B.from(0, j0), product.C + i0 * product.C_row + j0, product.C_row, accumulate, scratch,
           product.bias && !accumulate ? product.bias + j0 : nullptr);
      accumulate = true;
    }
    if (!accumulate) gemm<T>(i1 - i0, columns, 0, {}, {}, product.C + i0 * product.C_row + j0, product.C_row, false, scratch,
                             product.bias ? product.bias + j0 : nullptr);
  }
}

template <typename T>
void attention_cpu(const Attention<T>& problem, int64_t segments, T* output, T* log_sum_exp, int64_t begin, int64_t end) {
  constexpr int64_t tile = NR<T>;
  const int64_t N = problem.N, k = problem.k, H = problem.H, d = problem.d, row = H * d;
  Workspace<T> workspace;
  T* keys = workspace.take(k * d);                       // K / sqrt(d)
  T* values = workspace.take(panels_size<T>(k, d));      // V
  T* queries = workspace.take(panels_size<T>(d, tile));  // Q^T
  T* scores = workspace.take(k * tile);                  // S^T, a query a lane: no sum goes across the lanes of a vector
  T* sums = workspace.take(tile);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t s = item % segments, h = item / segments % H, b = item / segments / H;
    copy_rows(problem.keys + b * k * row + h * d, row, k, d, problem.scale, keys);
    pack_panels<T>({problem.values + b * k * row + h * d, row, 1}, k, d, values);
    const int64_t last = segment_begin(N, segments, s + 1);
    for (int64_t n = segment_begin(N, segments, s); n < last; n += tile) {
      const int64_t rows = std::min(tile, last - n), filled = panels_size<T>(1, rows), offset = (b * N + n) * row + h * d;
      pack_panels<T>({problem.query + offset, 1, row}, d, rows, queries);
      gemm_panels<T>(k, filled, d, {keys, d, 1}, queries, d * NR<T>, scores, tile, false);
      for (int64_t i = 0; i < rows; i += VECTOR_LANES<T>) {
        vector_t<T> largest;
        store_vector(sums + i, exponentials_of_queries(scores + i, k, tile, largest));
        for (int64_t lane = 0; log_sum_exp && lane < std::min<int64_t>(VECTOR_LANES<T>, rows - i); ++lane)
          log_sum_exp[(b * H + h) * N + n + i + lane] = largest[lane] + std::log(sums[i + lane]);
      }
      gemm_panels<T>(rows, d, k, {scores, 1, tile}, values, k * NR<T>, output + offset, row, false);
      for (int64_t i = 0; i < rows; ++i) {
        T* result = output + offset + i * row;
        const T scale = T(1) / sums[i];
        for (int64_t c = 0; c < d; ++c) result[c] *= scale;
      }
    }
  }
}

template <typename T>
void attention_backward_cpu(const Attention<T>& problem, int64_t segments, const T* output, const T* log_sum_exp, const T* grad_output,
                            T* grad_query, T* grad_keys, T* grad_values, int64_t begin, int64_t end) {
  constexpr int64_t tile = 8 * MR;
  const int64_t N = problem.N, k = problem.k, H = problem.H, d = problem.d, row = H * d, scores_row = row_size<T>(k);
  const int64_t filled = panels_size<T>(1, k), channels = panels_size<T>(1, d);
  Workspace<T> workspace;
  T* keys_transposed = workspace.take(panels_size<T>(d, k));
  T* values_transposed = workspace.take(panels_size<T>(d, k));
  T* keys = workspace.take(panels_size<T>(k, d));
  T* query = workspace.take(tile * d);
  T* grad = workspace.take(tile * d);
  T* packed = workspace.take(panels_size<T>(tile, d));
  T* scores = workspace.take(tile * scores_row);
  T* grad_P = workspace.take(tile * scores_row);
  T* sum_keys = workspace.take(k * channels);
  T* sum_values = workspace.take(k * channels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t s = item % segments, h = item / segments % H, b = item / segments / H;
    const T *K = problem.keys + b * k * row + h * d, *V = problem.values + b * k * row + h * d;
    pack_panels<T>({K, 1, row}, d, k, keys_transposed);
    pack_panels<T>({V, 1, row}, d, k, values_transposed);
    pack_panels<T>({K, row, 1}, k, d, keys);
    for (int64_t e = 0; e < k * channels; ++e) keys[e] *= problem.scale;
    for (int64_t e = 0; e < d * filled; ++e) keys_transposed[e] *= problem.scale;  // forward's scores to the last bit: P sums to 1
    std::fill(sum_keys, sum_keys + k * channels, T(0));
    std::fill(sum_values, sum_values + k * channels, T(0));
    const int64_t last = segment_begin(N, segments, s + 1);
    for (int64_t n = segment_begin(N, segments, s); n < last; n += tile) {
      const int64_t rows = std::min(tile, last - n), offset = (b * N + n) * row + h * d;
      copy_rows(problem.query + offset, row, rows, d, T(1), query);
      copy_rows(grad_output + offset, row, rows, d, T(1), grad);
      gemm_panels<T>(rows, filled, d, {query, d, 1}, keys_transposed, d * NR<T>, scores, scores_row, false);
      gemm_panels<T>(rows, filled, d, {grad, d, 1}, values_transposed, d * NR<T>, grad_P, scores_row, false);
      for (int64_t i = 0; i < rows; ++i) {
        const T mean = dot(grad + i * d, output + offset + i * row, d);
        grad_of_row(scores + i * scores_row, grad_P + i * scores_row, k, log_sum_exp[(b * H + h) * N + n + i], mean);
      }
      gemm_panels<T>(rows, d, k, {grad_P, scores_row, 1}, keys, k * NR<T>, grad_query + offset, row, false);
      pack_panels<T>({grad, d, 1}, rows, d, packed);
      gemm_panels<T>(k, channels, rows, {scores, 1, scores_row}, packed, rows * NR<T>, sum_values, channels, true);
      pack_panels<T>({query, d, 1}, rows, d, packed);
      gemm_panels<T>(k, channels, rows, {grad_P, 1, scores_row}, packed, rows * NR<T>, sum_keys, channels, true);
    }
    for (int64_t j = 0; j < k; ++j) {
      const int64_t target = ((s * problem.B + b) * k + j) * row + h * d;
      copy_rows(sum_keys + j * channels, channels, 1, d, problem.scale, grad_keys + target);
      std::copy(sum_values + j * channels, sum_values + j * channels + d, grad_values + target);
    }
  }
}

#define INSTANTIATE(T)                                                                                                                \
  template int64_t product_blocks<T>(const Product<T>&);                                                                              \
  template void product_cpu<T>(const Product<T>&, int64_t, int64_t);                                                                  \
  template void attention_cpu<T>(const Attention<T>&, int64_t, T*, T*, int64_t, int64_t);                                             \
  template void attention_backward_cpu<T>(const Attention<T>&, int64_t, const T*, const T*, const T*, T*, T*, T*, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace minidamage
