// Parallel loops. The threads are those of the process's one pool (threads.cc), which all operators share.
//
// A loop's tasks are divided among the threads; one that is done with its own takes tasks of the others (work stealing).
// So a core that is busy with something else does not hold up the rest. Which thread runs a task must not matter to its
// result.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <vector>

extern "C" {
// The threads of the process's operators, the calling one included.
int mindska_threads();

// Calls work(context, 0) in this thread, and work(context, i) for some i of 1 ... threads - 1 in others at the same time,
// as many as are free. Returns when all calls have returned.
void mindska_run_parallel(int threads, void (*work)(void *context, int index), void *context);
}

namespace mindska {

// Elements to compute above which an operator uses several threads: with less to do, one is done sooner than the others
// have been woken up. Chosen on two cores of an x86-64 with AVX-512.
constexpr int64_t kMinParallelWork = 1 << 15;
constexpr int64_t kAlwaysParallel = INT64_MAX;

// The tasks 0 ... count - 1 of a loop. Each thread has a part of them, neighbouring tasks, and takes some at a time.
class TaskParts {
 public:
  TaskParts(int64_t count, int threads)
      : chunk_(std::max<int64_t>(1, count / (kChunksOfThread * threads))), parts_(threads) {
    for (int i = 0; i < threads; ++i) {
      parts_[i].next = count * i / threads;
      parts_[i].end = count * (i + 1) / threads;
    }
  }

  int threads() const { return static_cast<int>(parts_.size()); }

  // Takes some tasks [*first, *end) of a thread's part; false when none are left.
  bool take(int part, int64_t *first, int64_t *end) {
    *first = parts_[part].next.fetch_add(chunk_, std::memory_order_relaxed);
    *end = std::min(*first + chunk_, parts_[part].end);
    return *first < *end;
  }

 private:
  static constexpr int64_t kChunksOfThread = 16;  // chosen on two cores of an x86-64 with AVX-512
  struct alignas(64) Part {  // a line of the cache each
    std::atomic<int64_t> next;
    int64_t end;
  };

  const int64_t chunk_;
  std::vector<Part> parts_;
};

// What one thread does of a loop: `for (const int64_t task : tasks)`.
class Tasks {
 public:
  Tasks(TaskParts *parts, int index) : parts_(parts), index_(index) {}

  struct End {};
  class Iterator {
   public:
    explicit Iterator(Tasks *tasks) : tasks_(tasks), task_(tasks->next()) {}
    int64_t operator*() const { return task_; }
    void operator++() { task_ = tasks_->next(); }
    bool operator!=(End) const { return task_ >= 0; }

   private:
    Tasks *tasks_;
    int64_t task_;
  };

  Iterator begin() { return Iterator(this); }
  End end() const { return {}; }

 private:
  int64_t next() {
    if (next_ < end_) return next_++;
    for (; victim_ < parts_->threads(); ++victim_) {  // its own part first, then those of the others
      if (parts_->take((index_ + victim_) % parts_->threads(), &next_, &end_)) return next_++;
    }
    return -1;
  }

  TaskParts *parts_;
  const int index_;
  int victim_ = 0;  // counted from its own part
  int64_t next_ = 0, end_ = 0;
};

// Runs worker(tasks) on several threads if there is enough `work` (elements to compute), else in this one; together they
// get the tasks 0 ... count - 1. What a worker throws is thrown here.
template <typename Worker>
static void parallel(int64_t count, int64_t work, const Worker &worker) {
  const int wanted = work > kMinParallelWork ? mindska_threads() : 1;
  struct Loop {
    TaskParts parts;
    const Worker &worker;
    std::atomic<bool> failed;
    std::exception_ptr error;
  } loop{{count, static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, count)))}, worker, {false}, nullptr};
  const auto run = [](void *context, int index) {
    Loop &loop = *static_cast<Loop *>(context);
    try {
      Tasks tasks(&loop.parts, index);
      loop.worker(tasks);
    } catch (...) {
      if (!loop.failed.exchange(true)) loop.error = std::current_exception();
    }
  };
  if (loop.parts.threads() > 1) {
    mindska_run_parallel(loop.parts.threads(), run, &loop);
  } else {
    run(&loop, 0);
  }
  if (loop.error) std::rethrow_exception(loop.error);
}

// function(task) for the tasks 0 ... count - 1, as above.
template <typename Function>
static void parallel_for(int64_t count, int64_t work, const Function &function) {
  parallel(count, work, [&](Tasks &tasks) {
    for (const int64_t task : tasks) function(task);
  });
}

}  // namespace mindska
