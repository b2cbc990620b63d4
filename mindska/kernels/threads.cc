// The pool of threads behind threads.h: one for the process, so that operators of several libraries do not start a pool
// each. It depends on no environment variable that is read when some library is loaded.
//
// A thread without work looks for some for a short while, which is sooner than to be woken up, and then sleeps: it must
// not take the core from MindSpore's own operators, or from other processes. A thread that comes late to a loop finds it
// closed and stays out: the caller waits for those only that have begun.
//
// Here is as well what else the libraries share: the table of their operators (registry.h).
#include "threads.h"

#include "registry.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <string>
#include <thread>

namespace mindska {

// How long a thread looks for work before it sleeps. Chosen on two cores of an x86-64: MindSpore takes 10 to 50
// microseconds from one operator to the next.
constexpr std::chrono::microseconds kSpinTime(50);

static inline void pause_core() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether done() becomes true within kSpinTime.
template <typename Done>
static bool spin_until(Done done) {
  const auto end = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      pause_core();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

class ThreadPool {
 public:
  // Several operators may run at once: one of them gets the pool, and the others run in their own thread.
  void run(int threads, void (*work)(void *, int), void *context) {
    if (inside_loop_) return work(context, 0);
    std::unique_lock<std::mutex> in_use(in_use_, std::try_to_lock);
    if (!in_use) return work(context, 0);
    inside_loop_ = true;
    start(threads - 1);
    work_ = work;
    context_ = context;
    threads_ = threads;
    entered_ = 1;  // the caller
    state_.store(0);  // open, nobody in it
    generation_.fetch_add(1);
    wake(threads - 1);
    work(context, 0);
    close();
    inside_loop_ = false;
  }

 private:
  static constexpr uint32_t kClosed = 1u << 31;  // the other bits of `state_` count the threads in the loop

  // Makes the threads up to `count`. Signals are for the threads that the program knows.
  void start(int count) {
    if (static_cast<int>(started_) >= count) return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; started_ < count; ++started_) {
        std::thread([this, seen = generation_.load()] { serve(seen); }).detach();
      }
    } catch (const std::system_error &) {  // the system gives no more: those that there are will do
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void wake(int count) {
    if (sleeping_.load() == 0) return;
    { std::lock_guard<std::mutex> lock(mutex_); }
    for (int i = std::min(count, sleeping_.load()); i > 0; --i) work_arrived_.notify_one();
  }

  void close() {
    state_.fetch_or(kClosed);
    const auto is_empty = [this] { return state_.load() == kClosed; };
    if (spin_until(is_empty)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    loop_ended_.wait(lock, is_empty);
  }

  bool enter() {
    uint32_t state = state_.load();
    while (!(state & kClosed)) {
      if (state_.compare_exchange_weak(state, state + 1)) return true;
    }
    return false;
  }

  void leave() {
    if (state_.fetch_sub(1) == kClosed + 1) {
      std::lock_guard<std::mutex> lock(mutex_);
      loop_ended_.notify_one();
    }
  }

  [[noreturn]] void serve(uint32_t seen) {
    inside_loop_ = true;
    while (true) {
      const auto has_work = [&] { return generation_.load() != seen; };
      if (!spin_until(has_work)) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleeping_;
        work_arrived_.wait(lock, has_work);
        --sleeping_;
      }
      seen = generation_.load();
      if (enter()) {
        // Numbered as they come: a small loop takes any of many threads.
        const int index = entered_.fetch_add(1);
        if (index < threads_) work_(context_, index);
        leave();
      }
    }
  }

  static thread_local bool inside_loop_;

  std::mutex in_use_, mutex_;
  std::condition_variable work_arrived_, loop_ended_;
  std::atomic<uint32_t> generation_{0}, state_{kClosed};
  std::atomic<int> sleeping_{0}, entered_{0};
  int started_ = 0;

  // Of the loop that is run: written while it is closed and empty, read by threads that are in it.
  void (*work_)(void *, int) = nullptr;
  void *context_ = nullptr;
  int threads_ = 0;
};

thread_local bool ThreadPool::inside_loop_ = false;

static std::atomic<int> thread_count{1};
static std::atomic<ThreadPool *> pool{nullptr};

// A child of fork has none of its parent's threads: it gets a pool of its own. What is left of the parent's is not
// touched.
static void forget_pool() { pool = nullptr; }

static ThreadPool &the_pool() {
  static const bool prepared = [] { return pthread_atfork(nullptr, nullptr, forget_pool) == 0; }();
  (void)prepared;
  ThreadPool *current = pool.load();
  if (!current) {
    ThreadPool *made = new ThreadPool;  // for as long as the process lives: its threads have no end
    if (pool.compare_exchange_strong(current, made)) return *made;
    delete made;
  }
  return *current;
}

// Made at first use: libraries add their operators before this one's own variables exist, where all are one program.
struct OperatorTable {
  std::mutex mutex;
  std::map<std::string, std::pair<const char *, MindskaFunction>> operators;
};

static OperatorTable &operator_table() {
  static OperatorTable *table = new OperatorTable;  // for as long as the process lives
  return *table;
}

}  // namespace mindska

extern "C" {

bool mindska_add_operator(const char *name, const char *signature, MindskaFunction function) {
  mindska::OperatorTable &table = mindska::operator_table();
  const std::lock_guard<std::mutex> lock(table.mutex);
  table.operators[name] = {signature, function};
  return true;
}

const char *mindska_find_operator(const char *name, MindskaFunction *function) {
  mindska::OperatorTable &table = mindska::operator_table();
  const std::lock_guard<std::mutex> lock(table.mutex);
  const auto found = table.operators.find(name);
  if (found == table.operators.end()) return nullptr;
  *function = found->second.second;
  return found->second.first;
}

int mindska_threads() { return mindska::thread_count.load(std::memory_order_relaxed); }

void mindska_set_threads(int threads) { mindska::thread_count = std::max(1, threads); }

void mindska_run_parallel(int threads, void (*work)(void *context, int index), void *context) {
  mindska::the_pool().run(threads, work, context);
}
}
