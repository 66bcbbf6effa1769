#include "memory.h"

#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "layout.h"
#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace u2moe {

namespace {
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kChunk = size_t{32} << 20;
constexpr std::align_val_t kAlignment{kLine};
// With U2MOE_CHECKED, no memory is shared, kept for later or larger than requested. Sanitizers and valgrind can then
// detect every access beyond an array or after its lifetime.
#if defined(U2MOE_CHECKED)
constexpr bool kIsChecked = true;
#else
constexpr bool kIsChecked = false;
#endif
}  // namespace

// Address space in which weights lie one after another. It is released with the last of these weights.
struct Chunk {
  uint8_t* begin;
  size_t size, used, users;
};

namespace {

std::mutex& lock();

// The lock is never destroyed, because kernels may outlive static objects. The forking thread holds it during a fork,
// and releases it in both processes. If another thread held it, it would stay locked in the child, because that thread
// does not exist there.
std::mutex* make_lock() {
  auto* made = new std::mutex;
#if !defined(_WIN32)
  pthread_atfork([] { lock().lock(); }, [] { lock().unlock(); }, [] { lock().unlock(); });
#endif
  return made;
}

std::mutex& lock() {
  static std::mutex* const mutex = make_lock();
  return *mutex;
}
Chunk* open_chunk = nullptr;  // chunk with room, or null

Chunk* make_chunk(size_t size) {
#if defined(__linux__) && !defined(U2MOE_CHECKED)
  // Only written pages take memory, so unused space costs nothing.
  const size_t space = size + kHugePage;
  void* mapped = mmap(nullptr, space, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  auto* start = static_cast<uint8_t*>(mapped);
  auto* begin = reinterpret_cast<uint8_t*>(rounded_up(reinterpret_cast<uintptr_t>(start), kHugePage));
  const size_t before = static_cast<size_t>(begin - start), after = space - before - size;
  if (before > 0) munmap(start, before);
  if (after > 0) munmap(begin + size, after);
  madvise(begin, size, MADV_HUGEPAGE);  // may fail: without huge pages, everything is only slightly slower
#else
  auto* begin = static_cast<uint8_t*>(::operator new(size, kAlignment));
#endif
  return new Chunk{begin, size, 0, 0};
}

void release(Chunk* chunk) {
#if defined(__linux__) && !defined(U2MOE_CHECKED)
  munmap(chunk->begin, chunk->size);
#else
  ::operator delete(chunk->begin, kAlignment);
#endif
  delete chunk;
}

#if defined(__linux__)
// Returns whether pages `first` to `last` (exclusive) still belong to their file. Once a page has
// been written to, it is a copy in memory or in swap space.
bool are_of_file(uintptr_t first, uintptr_t last) {
  constexpr uint64_t kPresent = uint64_t{1} << 63, kSwapped = uint64_t{1} << 62, kOfFile = uint64_t{1} << 61;
  const int pages = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pages < 0) return false;
  bool holds = true;
  uint64_t entries[512];
  while (holds && first < last) {
    const size_t count = last - first < 512 ? last - first : 512;
    const auto bytes = static_cast<ssize_t>(count * sizeof *entries);
    holds = pread(pages, entries, static_cast<size_t>(bytes), static_cast<off_t>(first * sizeof *entries)) == bytes;
    for (size_t i = 0; holds && i < count; i++)
      holds = !(entries[i] & kSwapped) && (!(entries[i] & kPresent) || (entries[i] & kOfFile));
    first += count;
  }
  close(pages);
  return holds;
}
#endif

}  // namespace

void give_back_file_pages([[maybe_unused]] const void* data, [[maybe_unused]] size_t bytes) noexcept {
#if defined(__linux__)
  // Weights that onnxruntime has mapped from a file can be read again at any time. Pages that the weights fill only in
  // part are kept, since they may also contain other data.
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = rounded_up(reinterpret_cast<uintptr_t>(data), page);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin < end && are_of_file(begin / page, end / page))
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
#endif
}

Weights::Weights(size_t bytes) {
  bytes = kIsChecked ? bytes : rounded_up(bytes, kLine);
  const std::lock_guard<std::mutex> guard(lock());
  if (kIsChecked || open_chunk == nullptr || open_chunk->size - open_chunk->used < bytes) {
    Chunk* made = make_chunk(kIsChecked ? bytes : rounded_up(bytes > kChunk ? bytes : kChunk, kHugePage));
    open_chunk = made;
  }
  chunk_ = open_chunk;
  data_ = chunk_->begin + chunk_->used;
  chunk_->used += bytes;
  chunk_->users++;
}

Weights& Weights::operator=(Weights&& other) noexcept {
  std::swap(chunk_, other.chunk_);
  std::swap(data_, other.data_);
  return *this;
}

Weights::~Weights() {
  if (chunk_ == nullptr) return;
  const std::lock_guard<std::mutex> guard(lock());
  if (--chunk_->users > 0) return;
  if (chunk_ == open_chunk) open_chunk = nullptr;
  release(chunk_);
}

Scratch::~Scratch() {
  for (uint8_t* array : arrays_) ::operator delete(array, kAlignment);
}

uint8_t* Scratch::bytes(size_t number, size_t size) {
  size = kIsChecked ? size : rounded_up(size + kLine, kLine);
  if (kIsChecked || sizes_[number] < size) {
    ::operator delete(arrays_[number], kAlignment);
    arrays_[number] = nullptr;
    sizes_[number] = 0;
    arrays_[number] = static_cast<uint8_t*>(::operator new(size, kAlignment));
    sizes_[number] = size;
  }
  return arrays_[number];
}

namespace {
// Scratch that no call uses at the moment. It is freed when the library is unloaded or the process ends. Kernels may
// outlive this pool; their calls then use scratch of their own.
class Pool {
 public:
  ~Pool() {
    const std::lock_guard<std::mutex> guard(lock());
    is_over = true;
    free_.clear();
  }
  static std::unique_ptr<Scratch> take() {
    const std::lock_guard<std::mutex> guard(lock());
    if (is_over) return nullptr;
    auto& free = the_pool().free_;
    if (free.empty()) return nullptr;
    std::unique_ptr<Scratch> taken = std::move(free.back());
    free.pop_back();
    return taken;
  }
  static void give(std::unique_ptr<Scratch> scratch) {
    const std::lock_guard<std::mutex> guard(lock());
    if (!is_over) the_pool().free_.push_back(std::move(scratch));
  }

 private:
  static Pool& the_pool() {
    static Pool pool;
    return pool;
  }
  static inline bool is_over = false;
  std::vector<std::unique_ptr<Scratch>> free_;
};
}  // namespace

Borrowed::Borrowed() : scratch_(Pool::take()) {
  if (!scratch_) scratch_ = std::make_unique<Scratch>();
}

Borrowed::~Borrowed() {
  try {
    Pool::give(std::move(scratch_));
  } catch (const std::bad_alloc&) {  // the scratch is then freed
  }
}

}  // namespace u2moe
