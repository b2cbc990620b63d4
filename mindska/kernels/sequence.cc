// A sequence of operators as one: a whole network in evaluation, without a framework between them.
//
// What is run, and where its tensors lie, stands in a plan (mindska/acceleration/sequence.py writes it). Nothing in it is
// trusted: before anything runs every operator is found by its name, every tensor is found to lie within its memory, and
// their shapes, types and numbers are checked against the operator's signature. What was checked is kept for the next
// call with the same plan and the same shapes.
//
//   plan:      mark, sizes of plan, constants and y, units of the arena, number of operators, then for each operator
//   operator:  length of its name, the name's characters, number of tensors (inputs, then outputs), then for each tensor
//   tensor:    place, offset, 1 where it is int32, rank, sizes
//
// A place is one of `Place`, or kWeights + the number of a weight. The numbers that operators take stand in the plan.
#include <memory>
#include <mutex>

#include "simd.h"

namespace mindska {

constexpr int32_t kPlanMark = 0x6d736b31;
constexpr int64_t kUnit = 16;  // floats of the arena: buffers begin at a line of the cache
constexpr int kMaxRank = 8, kMaxTensors = 64;
constexpr size_t kKeptPlans = 16;
constexpr const char *kTypes[] = {"float32", "int32"};

enum Place : int32_t { kImages, kConstants, kPlan, kArena, kResult, kWeights };

// Memory for the values between the operators. A call takes one and gives it back; there are as many as there were calls
// at a time.
class Arena {
 public:
  explicit Arena(int64_t floats) {
    {
      const std::lock_guard<std::mutex> lock(mutex());
      if (!idle().empty()) buffer_ = std::move(idle().back()), idle().pop_back();
    }
    if (buffer_.size >= floats) return;
    buffer_ = {};  // the old one goes before a larger one comes
    buffer_.data.reset(static_cast<float *>(std::aligned_alloc(kUnit * sizeof(float), floats * sizeof(float))));
    if (!buffer_.data) throw std::bad_alloc();
    buffer_.size = floats;
  }

  ~Arena() {
    const std::lock_guard<std::mutex> lock(mutex());
    idle().push_back(std::move(buffer_));
  }

  float *data() const { return buffer_.data.get(); }

 private:
  struct Free {
    void operator()(float *p) const { std::free(p); }
  };
  struct Buffer {
    std::unique_ptr<float[], Free> data;
    int64_t size = 0;
  };

  static std::mutex &mutex() {
    static std::mutex *one = new std::mutex;
    return *one;
  }
  static std::vector<Buffer> &idle() {
    static std::vector<Buffer> *all = new std::vector<Buffer>;
    return *all;
  }

  Buffer buffer_;
};

// The tensors of a call of mindska_sequence.
struct CallTensors {
  int count;
  void **data;
  const int *ranks;
  int64_t **shapes;

  int64_t size(int i) const { return element_count(shapes[i], ranks[i]); }
  int result() const { return count - 1; }
  const int32_t *plan() const { return static_cast<const int32_t *>(data[kPlan]); }
};

// A plan that was checked, for some shapes.
class CheckedPlan {
 public:
  explicit CheckedPlan(const CallTensors &call) : shapes_(shapes_of(call)) {
    const int64_t size = call.size(kPlan);
    if (size < 2 || call.plan()[0] != kPlanMark) throw Refused("it is no plan");
    if (call.plan()[1] != size) throw Refused("the plan has another size");
    numbers_.assign(call.plan(), call.plan() + size);
    at_ = 2;
    for (const int tensor : {static_cast<int>(kConstants), call.result()}) {
      if (next() != call.size(tensor)) throw Refused("the plan is for other sizes");
    }
    arena_ = next(0, INT32_MAX) * kUnit;
    const int64_t count = next(1, INT32_MAX);
    for (int64_t i = 0; i < count; ++i) read_operator(call);
    if (arena_ != used_) throw Refused("the arena has another size");
  }

  bool is_for(const CallTensors &call) const {
    return call.size(kPlan) == static_cast<int64_t>(numbers_.size()) &&
           std::memcmp(call.plan(), numbers_.data(), numbers_.size() * sizeof(int32_t)) == 0 && shapes_of(call) == shapes_;
  }

  void run(const CallTensors &call) const {
    const Arena arena(arena_);
    for (const Step &step : steps_) {
      void *params[kMaxTensors];
      int ranks[kMaxTensors];
      int64_t *shapes[kMaxTensors];
      const int tensors = static_cast<int>(step.tensors.size());
      for (int i = 0; i < tensors; ++i) {
        const TensorPlace &tensor = step.tensors[i];
        params[i] = address(tensor, call, arena.data());
        ranks[i] = tensor.rank;
        shapes[i] = const_cast<int64_t *>(tensor.sizes);
      }
      if (const int code = step.function(tensors, params, ranks, shapes)) throw Refused("an operator failed", code);
    }
  }

 private:
  struct TensorPlace {
    int32_t place;
    int64_t offset;
    int rank;
    int64_t sizes[kMaxRank];
  };
  struct Step {
    MindskaFunction function;
    std::vector<TensorPlace> tensors;
  };

  static std::vector<int64_t> shapes_of(const CallTensors &call) {
    std::vector<int64_t> all;
    for (int i = 0; i < call.count; ++i) {
      all.push_back(call.ranks[i]);
      all.insert(all.end(), call.shapes[i], call.shapes[i] + call.ranks[i]);
    }
    return all;
  }

  int64_t next(int64_t least = INT32_MIN, int64_t most = INT32_MAX) {
    if (at_ == numbers_.size()) throw Refused("the plan is too short");
    const int64_t value = numbers_[at_++];
    if (value < least || value > most) throw Refused("number " + std::to_string(at_ - 1) + " of the plan is wrong");
    return value;
  }

  void read_operator(const CallTensors &call) {
    std::string name;
    for (int64_t left = next(1, 100); left > 0; --left) name += static_cast<char>(next('0', 'z'));
    Step step;
    const char *signature = mindska_find_operator(name.c_str(), &step.function);
    if (!signature || name == "mindska_sequence") throw Refused("there is no operator " + name);
    const int count = static_cast<int>(next(1, kMaxTensors)), inputs = count - Signature::outputs(signature);
    std::vector<const char *> types;
    for (int i = 0; i < count; ++i) {
      int type;
      step.tensors.push_back(read_tensor(call, i >= inputs, &type));
      types.push_back(kTypes[type]);
    }
    std::vector<void *> params;
    std::vector<int> ranks;
    std::vector<int64_t *> shapes;
    for (TensorPlace &tensor : step.tensors) {
      // Values are not read here, but for numbers: the arena does not exist yet.
      params.push_back(tensor.place == kArena ? numbers_.data() : address(tensor, call, nullptr));
      ranks.push_back(tensor.rank);
      shapes.push_back(tensor.sizes);
    }
    Signature(signature, count, params.data(), ranks.data(), shapes.data(), types.data()).check();
    steps_.push_back(std::move(step));
  }

  TensorPlace read_tensor(const CallTensors &call, bool is_output, int *type) {
    TensorPlace tensor{};
    tensor.place = static_cast<int32_t>(next(0, int64_t{kWeights} + call.result() - kPlan - 2));
    tensor.offset = next(0, INT32_MAX);
    *type = static_cast<int>(next(0, 1));
    tensor.rank = static_cast<int>(next(0, kMaxRank));
    int64_t size = 1;
    for (int i = 0; i < tensor.rank; ++i) {
      tensor.sizes[i] = next(1, INT32_MAX);
      if (size > kMaxElements / tensor.sizes[i]) throw Refused("a tensor is too large");
      size *= tensor.sizes[i];
    }
    const bool is_buffer = tensor.place == kArena || tensor.place == kResult;
    if (is_output && !is_buffer) throw Refused("an operator must not write its inputs");
    // Numbers are checked with the plan only: they must not change afterwards.
    if (*type != (is_output ? *type : tensor.place == kPlan)) throw Refused("numbers stand in the plan");
    if (tensor.place == kResult && *type) throw Refused("the result is float32");
    if (tensor.place == kArena) tensor.offset *= kUnit;
    const int64_t available = tensor.place == kArena ? arena_ : call.size(index(tensor, call));
    if (tensor.offset > available - size) throw Refused("number " + std::to_string(at_ - 1) + " of the plan: a tensor lies outside of its memory");
    if (tensor.place == kArena) used_ = std::max(used_, round_up(tensor.offset + size, kUnit));
    const bool whole = tensor.place == kImages || tensor.place >= kWeights;
    if (whole && (tensor.offset || size != available)) throw Refused("a tensor is not as large as the plan says");
    return tensor;
  }

  // Among the tensors of the call.
  static int index(const TensorPlace &tensor, const CallTensors &call) {
    if (tensor.place == kResult) return call.result();
    return tensor.place < kArena ? tensor.place : kPlan + 1 + tensor.place - kWeights;
  }

  void *address(const TensorPlace &tensor, const CallTensors &call, float *arena) const {
    if (tensor.place == kPlan) return const_cast<int32_t *>(numbers_.data()) + tensor.offset;
    if (tensor.place == kArena) return arena + tensor.offset;
    return static_cast<float *>(call.data[index(tensor, call)]) + tensor.offset;
  }

  std::vector<int32_t> numbers_;
  std::vector<int64_t> shapes_;
  std::vector<Step> steps_;
  int64_t arena_ = 0, used_ = 0;  // floats
  size_t at_ = 0;
};

// The plan of a call, checked now or before.
static std::shared_ptr<const CheckedPlan> checked_plan(const CallTensors &call) {
  static std::mutex *mutex = new std::mutex;
  static auto *kept = new std::vector<std::shared_ptr<const CheckedPlan>>;  // the one used last at the end
  {
    const std::lock_guard<std::mutex> lock(*mutex);
    for (size_t i = kept->size(); i-- > 0;) {
      if (!(*kept)[i]->is_for(call)) continue;
      std::rotate(kept->begin() + i, kept->begin() + i + 1, kept->end());
      return kept->back();
    }
  }
  const auto made = std::make_shared<const CheckedPlan>(call);
  const std::lock_guard<std::mutex> lock(*mutex);
  if (kept->size() == kKeptPlans) kept->erase(kept->begin());
  kept->push_back(made);
  return made;
}

}  // namespace mindska

// y: what the plan's operators write there.
MINDSKA_OPERATOR(mindska_sequence,
                 "images (B, C, H, W), constants (N), plan (P) int32, weights+ (*) -> y (*)") {
  using namespace mindska;
  const CallTensors call{nparam, params, ndims, shapes};
  checked_plan(call)->run(call);
  return 0;
}
