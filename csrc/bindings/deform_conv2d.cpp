// Deformable convolution: tensors in, launches and matrix products out (see tensors.h).
#include "deform_conv2d.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/searchsorted.h>

#include "tensors.h"

namespace minidamage {
namespace {

// The integers of the schema.
struct Geometry {
  at::IntArrayRef stride, padding, dilation;
  int64_t groups, offset_groups;
};

// Checks shapes, converts layouts, and holds the tensors that a DeformConv2d problem points into.
// input [N, C, H, W]; offset [N, 2 offset_groups K, OH, OW]; mask [N, offset_groups K, OH, OW]; weight [O, C / groups, KH, KW].
struct Arguments {
  int64_t N, C, H, W, O, KH, KW, OH, OW;
  Geometry geometry;
  Tensor input, weight, offset;  // [N, H, W, C]; [O, KH, KW, C / groups]; [P, offset_groups, K, 2]
  OptionalTensor mask;           // [P, offset_groups, K]

  Arguments(const Tensor& x, const Tensor& shifts, const OptionalTensor& scales, const Tensor& kernel, const Geometry& geometry,
            Tensor (*rows)(const Tensor&))
      : geometry(geometry) {
    const auto& [stride, padding, dilation, groups, offset_groups] = geometry;
    TORCH_CHECK(x.dim() == 4 && kernel.dim() == 4 && shifts.dim() == 4, "deform_conv2d: input, weight and offset must have 4 dimensions, "
                "got ", x.sizes(), ", ", kernel.sizes(), ", ", shifts.sizes());
    TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, "deform_conv2d: stride, padding and dilation must be "
                "pairs, got ", stride, ", ", padding, ", ", dilation);
    N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), O = kernel.size(0), KH = kernel.size(2), KW = kernel.size(3);
    constexpr int64_t most = int64_t(1) << 30;  // of any of these: their products below stay in 64 bits
    for (int i = 0; i < 2; i++)
      TORCH_CHECK(stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0 && stride[i] < most && padding[i] < most && dilation[i] < most,
                  "deform_conv2d: stride ", stride, ", padding ", padding, ", dilation ", dilation);
    TORCH_CHECK(H > 0 && W > 0 && KH > 0 && KW > 0 && C > 0 && O > 0 && H < most && W < most && KH < most && KW < most,
                "deform_conv2d: empty input or weight: ", x.sizes(), ", ", kernel.sizes());
    TORCH_CHECK(groups > 0 && C % groups == 0 && O % groups == 0 && kernel.size(1) == C / groups, "deform_conv2d: weight ",
                kernel.sizes(), " for input ", x.sizes(), " in ", groups, " groups");
    TORCH_CHECK(offset_groups > 0 && C % offset_groups == 0, "deform_conv2d: ", C, " channels in ", offset_groups, " offset groups");
    OH = (H + 2 * padding[0] - dilation[0] * (KH - 1) - 1) / stride[0] + 1;
    OW = (W + 2 * padding[1] - dilation[1] * (KW - 1) - 1) / stride[1] + 1;
    TORCH_CHECK(H + 2 * padding[0] > dilation[0] * (KH - 1) && W + 2 * padding[1] > dilation[1] * (KW - 1),
                "deform_conv2d: the kernel is larger than the padded input");
    check(shifts, {N, 2 * offset_groups * KH * KW, OH, OW}, "offset", x);
    if (scales.has_value()) check(*scales, {N, offset_groups * KH * KW, OH, OW}, "mask", x);
    TORCH_CHECK(kernel.device() == x.device() && kernel.scalar_type() == x.scalar_type(), "deform_conv2d: input is ", x.scalar_type(),
                " on ", x.device(), ", weight ", kernel.scalar_type(), " on ", kernel.device());
    input = rows(x), weight = kernel.permute({0, 2, 3, 1}).contiguous(), offset = comparable(rows(shifts));
    if (scales.has_value()) mask = comparable(rows(*scales));
  }

  // offset and mask are of the type that is computed in.
  static void check(const Tensor& t, at::IntArrayRef sizes, const char* name, const Tensor& x) {
    const at::ScalarType type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    TORCH_CHECK(t.sizes() == sizes && t.scalar_type() == type && t.device() == x.device(), "deform_conv2d: ", name, " must be ", sizes, " ",
                type, " on ", x.device(), ", got ", t.sizes(), " ", t.scalar_type(), " on ", t.device());
  }

  void check_grad(const Tensor& grad) const {
    TORCH_CHECK(grad.sizes() == at::IntArrayRef({N, O, OH, OW}) && grad.scalar_type() == input.scalar_type() &&
                    grad.device() == input.device(),
                "deform_conv2d: grad must be ", at::IntArrayRef({N, O, OH, OW}), " ", input.scalar_type(), ", got ", grad.sizes(), " ",
                grad.scalar_type());
  }
  void check_bias(const OptionalTensor& bias) const {
    if (bias.has_value())
      TORCH_CHECK(bias->dim() == 1 && bias->size(0) == O && bias->scalar_type() == input.scalar_type() &&
                      bias->device() == input.device(),
                  "deform_conv2d: bias must be [", O, "] ", input.scalar_type(), ", got ", bias->sizes(), " ", bias->scalar_type());
  }

  template <typename A>
  DeformConv2d<A> problem() const {
    const auto& [stride, padding, dilation, groups, offset_groups] = geometry;
    return {N, C, H, W, O, KH, KW, OH, OW, stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1], groups, offset_groups,
            offset.const_data_ptr<A>(), pointer_or_null<A>(mask)};
  }
};

// Gradients of offset and mask, [P, offset_groups, K, 2] and [P, offset_groups, K] or [0], as empty rows.
std::tuple<Tensor, Tensor> empty_offset_gradients(const Arguments& a) {
  const Tensor grad_mask = a.mask.has_value() ? at::empty(a.mask->sizes(), a.offset.options()) : at::empty({0}, a.offset.options());
  return {at::empty(a.offset.sizes(), a.offset.options()), grad_mask};
}

#if !defined(MINIDAMAGE_EMULATED)
void check_cpu_dtype(const Tensor& t) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, "deform_conv2d: float32 or float64 on a CPU, got ",
                    t.scalar_type());
}

// work(scratch, begin, end) over [0, count) in chunks, each thread with working memory of its own.
template <typename T, typename Work>
void with_scratch(const DeformConv2d<T>& problem, const Tensor& like, int64_t count, int64_t chunk, const Work& work) {
  const int64_t size = ceil_div(deform_scratch_size(problem), 64) * 64;
  Tensor scratch = at::zeros({std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), count)), size}, like.options());
  T* memory = scratch.mutable_data_ptr<T>();
  parallel_chunks(count, chunk, [&](int64_t begin, int64_t end) { work(memory + at::get_thread_num() * size, begin, end); });
}

Tensor deform_conv2d_on_cpu(const Tensor& input, const Tensor& offset, const OptionalTensor& mask, const Tensor& weight,
                            const OptionalTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                            int64_t groups, int64_t offset_groups) {
  check_cpu_dtype(input);
  const Arguments a(input, offset, mask, weight, {stride, padding, dilation, groups, offset_groups}, to_rows_cpu);
  a.check_bias(bias);
  const OptionalTensor shift = contiguous(bias);
  Tensor output = empty_large({a.N, a.OH, a.OW, a.O}, a.input.options());
  if (output.numel() > 0) in_compute_type(output, [&](auto zero) {
    using T = decltype(zero);
    const DeformConv2d<T> problem = a.problem<T>();
    Tensor packed = empty_large({deform_packed_size(problem)}, a.input.options());
    T* panels = packed.mutable_data_ptr<T>();
    const T* kernel = a.weight.const_data_ptr<T>();
    at::parallel_for(0, deform_panels(problem), 1, [&](int64_t begin, int64_t end) { deform_pack(problem, kernel, panels, begin, end); });
    with_scratch(problem, a.input, deform_tiles(problem), 1, [&](T* scratch, int64_t begin, int64_t end) {
      deform_conv2d_cpu(problem, a.input.const_data_ptr<T>(), panels, pointer_or_null<T>(shift), output.mutable_data_ptr<T>(), scratch,
                        begin, end);
    });
  });
  return from_rows_cpu(output, is_channels_last(input));
}

std::tuple<Tensor, Tensor, Tensor> deform_backward_input_on_cpu(const Tensor& grad, const Tensor& input, const Tensor& offset,
                                                                const OptionalTensor& mask, const Tensor& weight, at::IntArrayRef stride,
                                                                at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                                                int64_t offset_groups) {
  check_cpu_dtype(input);
  const Arguments a(input, offset, mask, weight, {stride, padding, dilation, groups, offset_groups}, to_rows_cpu);
  a.check_grad(grad);
  const Tensor rows = to_rows_cpu(grad);
  Tensor grad_input = empty_large(a.input.sizes(), a.input.options());
  auto [grad_offset, grad_mask] = empty_offset_gradients(a);
  if (a.N > 0) in_compute_type(rows, [&](auto zero) {
    using T = decltype(zero);
    const DeformConv2d<T> problem = a.problem<T>();
    Tensor packed = empty_large({deform_packed_backward_size(problem)}, rows.options());
    Tensor partial = empty_large({deform_parts(problem), problem.positions(), problem.taps(), 3}, rows.options());
    T* panels = packed.mutable_data_ptr<T>();
    T* parts = partial.mutable_data_ptr<T>();
    const T* kernel = a.weight.const_data_ptr<T>();
    at::parallel_for(0, deform_blocks(problem), 1,
                     [&](int64_t begin, int64_t end) { deform_pack_backward(problem, kernel, panels, begin, end); });
    with_scratch(problem, rows, a.N * deform_blocks(problem), 1, [&](T* scratch, int64_t begin, int64_t end) {
      deform_backward_input_cpu(problem, a.input.const_data_ptr<T>(), panels, rows.const_data_ptr<T>(), grad_input.mutable_data_ptr<T>(),
                                parts, scratch, begin, end);
    });
    T* of_offset = grad_offset.template mutable_data_ptr<T>();
    T* of_mask = mask.has_value() ? grad_mask.template mutable_data_ptr<T>() : nullptr;
    at::parallel_for(0, problem.positions(), 64, [&](int64_t begin, int64_t end) {
      deform_backward_offset_cpu(problem, parts, of_offset, of_mask, begin, end);
    });
  });
  return {from_rows_cpu(grad_input, is_channels_last(input)), from_rows_cpu(grad_offset, is_channels_last(offset)),
          mask.has_value() ? from_rows_cpu(grad_mask, is_channels_last(*mask)) : grad_mask};
}

Tensor deform_backward_weight_on_cpu(const Tensor& grad, const Tensor& input, const Tensor& offset, const OptionalTensor& mask,
                                     const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                     int64_t groups, int64_t offset_groups) {
  check_cpu_dtype(input);
  const Arguments a(input, offset, mask, weight, {stride, padding, dilation, groups, offset_groups}, to_rows_cpu);
  a.check_grad(grad);
  const Tensor rows = to_rows_cpu(grad);
  Tensor grad_weight = a.N > 0 ? empty_large(a.weight.sizes(), rows.options()) : at::zeros(a.weight.sizes(), rows.options());
  if (a.N > 0) in_compute_type(rows, [&](auto zero) {
    using T = decltype(zero);
    const DeformConv2d<T> problem = a.problem<T>();
    const int64_t owners = deform_blocks(problem) * problem.taps(), share = owners / (2 * at::get_num_threads());
    const int64_t chunk = std::clamp<int64_t>(share, 1, problem.taps());
    with_scratch(problem, rows, owners, chunk, [&](T* scratch, int64_t begin, int64_t end) {
      deform_backward_weight_cpu(problem, a.input.const_data_ptr<T>(), rows.const_data_ptr<T>(), grad_weight.mutable_data_ptr<T>(),
                                 scratch, begin, end);
    });
  });
  return from_rows(grad_weight, is_channels_last(weight));
}

TORCH_LIBRARY_IMPL(minidamage, CPU, m) {
  m.impl("deform_conv2d", deform_conv2d_on_cpu);
  m.impl("deform_conv2d_backward_input", deform_backward_input_on_cpu);
  m.impl("deform_conv2d_backward_weight", deform_backward_weight_on_cpu);
}
#endif

#if defined(MINIDAMAGE_DEVICE_KEY)
// The columns are made and multiplied a tile of positions at a time: 256 MiB fill any GPU with work and bound the memory. In tests so few
// that small arrays take several tiles, the last one shorter.
#if defined(MINIDAMAGE_EMULATED)
constexpr int64_t COLUMN_BYTES = 16 << 10;
#else
constexpr int64_t COLUMN_BYTES = int64_t(256) << 20;
#endif

// visit(first, count, columns) for every tile, columns [groups, count, K C / groups] uninitialised, one buffer for all.
template <typename Visit>
void for_each_tile(const Arguments& a, const Visit& visit) {
  const int64_t positions = a.N * a.OH * a.OW, depth = a.KH * a.KW * a.C;
  const int64_t most = std::max<int64_t>(1, COLUMN_BYTES / (depth * a.input.element_size()));
  const int64_t tiles = ceil_div(positions, most), tile = tiles ? ceil_div(positions, tiles) : 0;  // tiles of one size
  Tensor buffer = at::empty({tile * depth}, a.input.options());
  for (int64_t first = 0; first < positions; first += tile) {
    const int64_t count = std::min(tile, positions - first);
    Tensor columns = buffer.narrow(0, 0, count * depth).view({a.geometry.groups, count, depth / a.geometry.groups});
    visit(first, count, columns);
  }
}

// Rows [first, first + count) of [N, OH, OW, O] as [groups, count, O / groups].
Tensor grouped(const Tensor& rows, int64_t first, int64_t count, int64_t groups) {
  const int64_t O = rows.size(3);
  return rows.view({-1, O}).narrow(0, first, count).view({count, groups, O / groups}).transpose(0, 1);
}

Tensor deform_conv2d_on_cuda(const Tensor& input, const Tensor& offset, const OptionalTensor& mask, const Tensor& weight,
                             const OptionalTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                             int64_t groups, int64_t offset_groups) {
  const OnDevice device(input);
  const Arguments a(input, offset, mask, weight, {stride, padding, dilation, groups, offset_groups}, to_rows);
  a.check_bias(bias);
  Tensor output = at::empty({a.N, a.OH, a.OW, a.O}, a.input.options());
  const DType dtype = dtype_of(a.input);
  const Tensor kernel = a.weight.view({groups, a.O / groups, -1}).transpose(1, 2);  // [groups, K C / groups, O / groups]
  const Tensor start = bias.has_value() ? bias->view({groups, 1, a.O / groups}) : Tensor();  // added before the sum is rounded
  if (output.numel() > 0) for_each_tile(a, [&](int64_t first, int64_t count, Tensor& columns) {
    in_compute_type(a.input, [&](auto zero) {
      deform_columns_cuda(a.problem<decltype(zero)>(), dtype, a.input.const_data_ptr(), first, count, columns.data_ptr(), device.stream());
    });
    MD_LAUNCH_CHECK();
    Tensor target = grouped(output, first, count, groups);
    if (groups == 1 && bias.has_value()) at::baddbmm_out(target, start, columns, kernel);
    else if (groups == 1) at::bmm_out(target, columns, kernel);
    else target.copy_(bias.has_value() ? at::baddbmm(start, columns, kernel) : at::bmm(columns, kernel));
  });
  return from_rows(output, is_channels_last(input));
}

// grad_columns into grad_input, of float32 or float64, in a fixed order. Looks at the pictures of the tile alone: cells and pixels.
template <typename A>
void gather_in_order(const DeformConv2d<A>& whole, DType dtype, const Tensor& columns, int64_t first, int64_t count, Tensor& grad_input,
                     void* stream) {
  const int64_t size = whole.OH * whole.OW, begin = first / size, end = ceil_div(first + count, size);
  const DeformConv2d<A> problem = whole.pictures(begin, end - begin);
  first -= begin * size;
  const at::TensorOptions options = columns.options().dtype(at::kLong);
  Tensor cells = at::empty({count * problem.offset_groups * problem.taps()}, options);
  deform_cells_cuda(problem, first, count, cells.mutable_data_ptr<int64_t>(), stream);
  MD_LAUNCH_CHECK();
  const auto [sorted, order] = cells.sort(/*stable=*/true, 0, /*descending=*/false);
  const Tensor starts = at::searchsorted(sorted, at::arange(deform_cells(problem) + 1, options));
  deform_gather_cuda(problem, dtype, columns.const_data_ptr(), first, count, order.const_data_ptr<int64_t>(),
                     starts.const_data_ptr<int64_t>(), grad_input[begin].mutable_data_ptr<A>(), stream);
  MD_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor> deform_backward_input_on_cuda(const Tensor& grad, const Tensor& input, const Tensor& offset,
                                                                 const OptionalTensor& mask, const Tensor& weight, at::IntArrayRef stride,
                                                                 at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                                                 int64_t offset_groups) {
  const OnDevice device(input);
  const Arguments a(input, offset, mask, weight, {stride, padding, dilation, groups, offset_groups}, to_rows);
  a.check_grad(grad);
  const DType dtype = dtype_of(a.input);
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  const Tensor rows = to_rows(grad), kernel = a.weight.view({groups, a.O / groups, -1});
  Tensor grad_input = at::zeros(a.input.sizes(), a.offset.options());  // summed in float32, rounded once
  auto [grad_offset, grad_mask] = empty_offset_gradients(a);
  if (rows.numel() > 0) for_each_tile(a, [&](int64_t first, int64_t count, Tensor& columns) {
    at::bmm_out(columns, grouped(rows, first, count, groups), kernel);
    in_compute_type(a.input, [&](auto zero) {
      using A = decltype(zero);
      const DeformConv2d<A> problem = a.problem<A>();
      deform_backward_cuda(problem, dtype, a.input.const_data_ptr(), columns.const_data_ptr(), first, count,
                           deterministic ? nullptr : grad_input.mutable_data_ptr<A>(), grad_offset.template mutable_data_ptr<A>(),
                           mask.has_value() ? grad_mask.template mutable_data_ptr<A>() : nullptr, device.stream());
      MD_LAUNCH_CHECK();
      if (deterministic) gather_in_order(problem, dtype, columns, first, count, grad_input, device.stream());
    });
  });
  return {from_rows(grad_input.to(input.scalar_type()), is_channels_last(input)), from_rows(grad_offset, is_channels_last(offset)),
          mask.has_value() ? from_rows(grad_mask, is_channels_last(*mask)) : grad_mask};
}

Tensor deform_backward_weight_on_cuda(const Tensor& grad, const Tensor& input, const Tensor& offset, const OptionalTensor& mask,
                                      const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                      int64_t groups, int64_t offset_groups) {
  const OnDevice device(input);
  const Arguments a(input, offset, mask, weight, {stride, padding, dilation, groups, offset_groups}, to_rows);
  a.check_grad(grad);
  const DType dtype = dtype_of(a.input);
  const Tensor rows = to_rows(grad);
  Tensor grad_weight = at::zeros({groups, a.O / groups, a.KH * a.KW * a.C / groups}, a.offset.options());
  if (rows.numel() > 0) for_each_tile(a, [&](int64_t first, int64_t count, Tensor& columns) {
    in_compute_type(a.input, [&](auto zero) {
      deform_columns_cuda(a.problem<decltype(zero)>(), dtype, a.input.const_data_ptr(), first, count, columns.data_ptr(), device.stream());
    });
    MD_LAUNCH_CHECK();
    grad_weight.add_(at::bmm(grouped(rows, first, count, groups).transpose(1, 2), columns));
  });
  return from_rows(grad_weight.view(a.weight.sizes()).to(weight.scalar_type()), is_channels_last(weight));
}

MD_REGISTER(MINIDAMAGE_NAMESPACE, MINIDAMAGE_DEVICE_KEY, m) {
  m.impl("deform_conv2d", deform_conv2d_on_cuda);
  m.impl("deform_conv2d_backward_input", deform_backward_input_on_cuda);
  m.impl("deform_conv2d_backward_weight", deform_backward_weight_on_cuda);
}
#endif

}  // namespace
}  // namespace minidamage
