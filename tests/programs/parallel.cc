// Loops on the pool of threads: each task is run once, whatever else goes on. To be built with -fsanitize=thread. Prints
// the largest number of threads that were in a loop at once.
#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>

#include "threads.cc"

using namespace mindska;

static void expect(bool holds, const char *what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::_Exit(1);
}

// Runs loops of many lengths and counts how often each task was run.
static void run_loops(int repetitions) {
  for (int repetition = 0; repetition < repetitions; ++repetition) {
    for (const int64_t count : {0, 1, 2, 3, 7, 64, 1000}) {
      std::vector<int> runs(count);  // not atomic: two threads at one task would be a race
      parallel_for(count, kAlwaysParallel, [&](int64_t task) { ++runs[task]; });
      for (const int n : runs) expect(n == 1, "a task was not run once");
    }
  }
}

static int most_threads() {
  std::atomic<int> inside{0}, most{0};
  parallel(64, kAlwaysParallel, [&](Tasks &tasks) {
    const int now = ++inside;
    for (int seen = most; seen < now && !most.compare_exchange_weak(seen, now);) continue;
    for (const int64_t task : tasks) std::this_thread::sleep_for(std::chrono::milliseconds(task >= 0));
    --inside;
  });
  return most;
}

// Two tasks that wait for each other: both are in work at once, whichever of many threads wake up.
static void run_in_pairs() {
  for (int repetition = 0; repetition < 50; ++repetition) {
    std::atomic<int> begun{0};
    parallel_for(2, kAlwaysParallel, [&](int64_t) {
      ++begun;
      const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
      while (begun < 2 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
      expect(begun == 2, "a loop of two tasks ran in one thread");
    });
    if (repetition % 10 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // the others sleep
  }
}

int main(int argc, char **argv) {
  mindska_set_threads(argc > 1 ? std::atoi(argv[1]) : 4);
  run_loops(200);

  std::vector<std::thread> callers;  // several operators at once
  for (int i = 0; i < 3; ++i) callers.emplace_back(run_loops, 100);
  for (std::thread &caller : callers) caller.join();

  std::atomic<int64_t> sum{0};  // a loop in a loop
  parallel_for(8, kAlwaysParallel, [&](int64_t) { parallel_for(100, kAlwaysParallel, [&](int64_t task) { sum += task; }); });
  expect(sum == 8 * 4950, "a loop in a loop");

  for (const int64_t bad : {0, 50, 99}) {
    bool thrown = false;
    try {
      parallel_for(100, kAlwaysParallel, [=](int64_t task) {
        if (task == bad) throw std::runtime_error("bad");
      });
    } catch (const std::runtime_error &) {
      thrown = true;
    }
    expect(thrown, "what a task throws is lost");
  }
  std::printf("%d\n", most_threads());
  std::fflush(stdout);
  if (mindska_threads() > 1) run_in_pairs();

#ifndef __SANITIZE_THREAD__  // which knows no threads after fork
  const pid_t child = fork();
  if (child == 0) {
    run_loops(20);
    std::_Exit(most_threads() == mindska_threads() ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  expect(status == 0, "a child of fork");
#endif
  return 0;
}
