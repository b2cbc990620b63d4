// The 1x1 convolution, in groups or not, with its bias or with scale, shift and an epilogue; and its gradients.
#include "epilogue.h"
#include "matrix.h"

namespace mindska {

// The sizes and the weight of a 1x1 convolution in groups.
struct Pointwise {
  int64_t groups, rows, depth;
  const float *weight;

  Pointwise(const int64_t *x, const void *weight, const int64_t *shape)
      : groups(x[1] / shape[1]), rows(shape[0] / groups), depth(shape[1]), weight(static_cast<const float *>(weight)) {}

  // The transposed weights of all groups; those of one begin at a block.
  PackedMatrix packed_transposed() const {
    const int64_t padded = PackedMatrix::padded_rows(depth);
    return PackedMatrix(groups * padded, rows, [=](int64_t row, int64_t k) {
      return row % padded < depth ? weight[(row / padded * rows + k) * depth + row % padded] : 0;
    });
  }

  // All groups' products; left(group) is the left side of one, (outputs, inputs). epilogue(columns, row, vector, value) as
  // of `multiply_tile`.
  template <typename Left, typename Function>
  void multiply_groups(const Left &left, int64_t outputs, int64_t inputs, const void *x, const int64_t *shape,
                       Function epilogue) const {
    const int64_t columns = FeatureMaps(x, shape).columns();
    const Tiles tiles(outputs, columns);
    parallel(groups * tiles.tasks(), groups * product_work(outputs, inputs, columns), [&](Tasks &tasks) {
      const Workspace packed(Slot::kPackedColumns, inputs * kTileColumns);
      for (const int64_t task : tasks) {
        const int64_t group = task / tiles.tasks();
        multiply_tile(left(group), FeatureMaps(x, shape, group * inputs), tiles, task % tiles.tasks(), packed.data(),
                      [&](const Columns &columns, int64_t row, int vector, Vec value) {
                        epilogue(columns, group * outputs + row, vector, value);
                      });
      }
    });
  }

  template <typename Function>
  void multiply(const void *x, const int64_t *shape, Function epilogue) const {
    const RowMatrix all{groups * rows, depth, weight};
    multiply_groups([&](int64_t group) { return all.part(group * rows, rows); }, rows, depth, x, shape, epilogue);
  }
};

}  // namespace mindska

MINDSKA_OPERATOR(mindska_pointwise,
                 "x (B, C, H, W), weight (O, D, 1, 1), bias (O) -> y (B, O, H, W) where C % D == 0, O % (C / D) == 0") {
  using namespace mindska;
  const Pointwise p(shapes[0], params[1], shapes[1]);
  const float *bias = static_cast<float *>(params[2]);
  const FeatureMaps y(params[3], shapes[3]);
  p.multiply(params[0], shapes[0], [&](const Columns &columns, int64_t row, int vector, Vec value) {
    columns.store_vector(y, row, vector, value + bias[row]);
  });
  return 0;
}

// y = epilogue(scale * (weight x) + shift), of which some use `other`: it has y's shape then.
MINDSKA_OPERATOR(mindska_pointwise_epilogue,
                 "x (B, C, H, W), weight (O, D, 1, 1), scale (O), shift (O), other (B, O, H, W) or (O), "
                 "epilogue {epilogue} -> y (B, O, H, W) "
                 "where C % D == 0, O % (C / D) == 0, epilogue >= 0, epilogue <= 6, other * (epilogue / 3) == 0") {
  using namespace mindska;
  static_assert(Epilogue::add == Epilogue{3} && Epilogue::mul == Epilogue{6}, "the conditions above have these numbers");
  const Pointwise p(shapes[0], params[1], shapes[1]);
  const float *scale = static_cast<float *>(params[2]), *shift = static_cast<float *>(params[3]);
  const Epilogue epilogue = *static_cast<Epilogue *>(params[5]);
  const FeatureMaps y(params[6], shapes[6]), other(params[4], shapes[uses_other(epilogue) ? 4 : 6]);
  p.multiply(params[0], shapes[0], [&](const Columns &columns, int64_t row, int vector, Vec value) {
    const auto load_other = [&] { return columns.load_vector(other, row, vector); };
    value = apply(epilogue, scale[row] * value + shift[row], load_other);
    columns.store_vector(y, row, vector, value);
  });
  return 0;
}

MINDSKA_OPERATOR(mindska_pointwise_grad,
                 "x (B, C, H, W), weight (O, D, 1, 1), dy (B, O, H, W) -> dx (B, C, H, W), dweight (O, D, 1, 1), dbias (O) "
                 "where C % D == 0, O % (C / D) == 0") {
  using namespace mindska;
  const Pointwise p(shapes[0], params[1], shapes[1]);
  const FeatureMaps dx(params[3], shapes[0]);
  float *dweight = static_cast<float *>(params[4]), *dbias = static_cast<float *>(params[5]);
  const PackedMatrix transposed = p.packed_transposed();
  const int64_t padded = PackedMatrix::padded_rows(p.depth);
  p.multiply_groups([&](int64_t group) { return transposed.part(group * padded, p.depth); }, p.depth, p.rows, params[2],
                    shapes[2], [&](const Columns &columns, int64_t row, int vector, Vec value) {
                      columns.store_vector(dx, row, vector, value);
                    });
  const TransposedProduct product(p.rows, p.depth);
  parallel_for(p.groups * product.tasks(), transposed.work(dx.columns()), [&](int64_t task) {
    const int64_t group = task / product.tasks();
    const FeatureMaps x(params[0], shapes[0], group * p.depth), dy(params[2], shapes[2], group * p.rows);
    product.compute(task % product.tasks(), dy, x, dweight + group * p.rows * p.depth, dbias + group * p.rows);
  });
  return 0;
}
