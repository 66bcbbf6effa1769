// Computes the same layers in several threads at once, while layers are created and destroyed. Each of these threads
// has further threads for the tasks of a step, as in onnxruntime. Every digest must equal that of a single thread. Then
// the process forks while other threads allocate memory, and its children also compute. The program is for the thread
// sanitizer, which cannot see how threads wait inside onnxruntime.
#include <atomic>
#include <cstdio>
#include <thread>
#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "cases.h"

namespace u2moe {
namespace {

constexpr size_t kCallers = 3, kWorkers = 3, kRounds = 3, kForks = 20;
constexpr unsigned kLimit = 60;  // maximum seconds of a child process

// Workers that take tasks until none are left. `run` returns when all workers have finished.
class Team final : public Threads {
 public:
  void run(Task task, size_t count, void* state) const override {
    std::atomic<size_t> next{0};
    std::vector<std::thread> workers;
    for (size_t i = 0; i < kWorkers; i++)
      workers.emplace_back([&] {
        for (size_t index = next++; index < count; index = next++) task(state, index);
      });
    for (std::thread& worker : workers) worker.join();
  }
};

unsigned long long digest_of_all(const InstructionSet& isa, const Threads& threads) {
  return digest_of(isa, threads) ^ digest_of_convolutions(isa, threads);
}

bool is_equal_in_threads(const InstructionSet& isa) {
  const unsigned long long expected = digest_of_all(isa, Serial());
  std::atomic<size_t> different{0};
  std::vector<std::thread> callers;
  for (size_t i = 0; i < kCallers; i++)
    callers.emplace_back([&] {
      for (size_t round = 0; round < kRounds; round++) different += digest_of_all(isa, Team()) != expected;
    });
  for (std::thread& caller : callers) caller.join();
  std::printf("%s %s\n", isa.name, different == 0 ? "equal" : "different");
  return different == 0;
}

#if !defined(_WIN32) && !defined(__SANITIZE_ADDRESS__)  // the allocator of AddressSanitizer may be locked in a child
// Whether forked child processes compute the same results while other threads constantly allocate and free memory. The
// allocator takes a lock, which must be free in every child.
bool is_equal_in_children(const InstructionSet& isa) {
  const unsigned long long expected = digest_of_all(isa, Serial());
  std::atomic<bool> is_over{false};
  std::vector<std::thread> callers;
  for (size_t i = 0; i < kCallers; i++)
    callers.emplace_back([&] {
      while (!is_over) Weights{kBlock};
    });
  size_t failed = 0;
  for (size_t i = 0; i < kForks; i++) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(kLimit);  // ends a child that waits forever
      _exit(digest_of_all(isa, Serial()) == expected ? 0 : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    failed += status != 0;
  }
  is_over = true;
  for (std::thread& caller : callers) caller.join();
  std::printf("%s in %zu children: %zu failed\n", isa.name, kForks, failed);
  return failed == 0;
}
#else
bool is_equal_in_children(const InstructionSet&) { return true; }
#endif

}  // namespace
}  // namespace u2moe

int main() {
  const u2moe::InstructionSet* sets[8];
  bool is_equal = true;
  for (size_t i = 0, count = u2moe::available(sets); i < count; i++)
    is_equal = u2moe::is_equal_in_threads(*sets[i]) && is_equal;
  return u2moe::is_equal_in_children(*sets[0]) && is_equal ? 0 : 1;
}
