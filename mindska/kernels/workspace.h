// Buffers that a thread keeps from one call of an operator to the next, because fresh memory costs more than most
// operators do. Each has a name, and a handle holds it while it is in use.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "simd.h"

namespace mindska {

// The names. Two buffers that are in use at once need two of them.
enum class Slot {
  kPackedWeight,             // matrix.h, winograd.cc: a product's left side
  kPackedWeight2,            // fused_mlp.cc: the second 1x1 convolution's
  kPackedWeight1Transposed,  // fused_mlp.cc: for the gradient of the input
  kPackedColumns,            // matrix.h, winograd.cc: a product's right side
  kPackedLeftRows,           // matrix.h: both sides of dot products
  kPackedRightRows,
  kPaddedInput,     // grouped.cc, fused_mlp.cc, resize.cc
  kPaddedGradient,  // grouped.cc, fused_mlp.cc, resize.cc, strided.cc
  kPhasePlanes,     // strided.cc
  kPackedTaps,      // grouped.cc
  kAccumulator,     // grouped.cc, fused_mlp.cc, winograd.cc
  kExpanded,        // fused_mlp.cc: hidden channels before the 3x3 convolution,
  kActivated,       // after the GELU,
  kHiddenGradient,  // and their gradient; winograd.cc: transformed gradients
  kPixelVectors,    // winograd.cc: channels of pixels side by side
  kClassRows,       // pixel_cross_entropy.cc: rows of pixels, the classes side by side
  kSpilledRows,     // pixel_cross_entropy.cc: gradients for rows of the next task
  kCount
};

// At least `size` floats of this thread's own, until the handle goes. What they hold is left from before. Aligned: a
// vector that lies in two lines of the cache is read twice. To acquire a slot that is in use in the same thread is a
// mistake in an operator, which would corrupt both buffers: it ends the program.
class Workspace {
 public:
  Workspace(Slot slot, int64_t size) : buffer_(&buffer(slot)) {
    if (buffer_->in_use) {
      std::fprintf(stderr, "mindska: workspace %d is acquired twice in one thread\n", static_cast<int>(slot));
      std::abort();
    }
    buffer_->reserve(size);
    buffer_->in_use = true;
  }
  Workspace(Workspace &&other) noexcept : buffer_(other.buffer_) { other.buffer_ = nullptr; }
  Workspace &operator=(Workspace &&) = delete;
  ~Workspace() {
    if (buffer_) buffer_->in_use = false;
  }

  float *data() const { return static_cast<float *>(buffer_->data); }

 private:
  struct Buffer {
    void *data = nullptr;
    int64_t size = 0;
    bool in_use = false;

    ~Buffer() { std::free(data); }

    void reserve(int64_t wanted) {
      if (size >= wanted) return;
      std::free(data);
      data = nullptr;
      size = 0;
      const int64_t padded = (wanted + kLanes - 1) / kLanes * kLanes;
      data = std::aligned_alloc(sizeof(Vec), padded * sizeof(float));
      if (!data) throw std::bad_alloc();
      size = padded;
    }
  };

  static Buffer &buffer(Slot slot) {
    static thread_local Buffer buffers[static_cast<int>(Slot::kCount)];
    return buffers[static_cast<int>(slot)];
  }

  Buffer *buffer_;
};

}  // namespace mindska
