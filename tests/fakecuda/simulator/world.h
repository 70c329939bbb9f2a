// What the simulated GPU is made of: streams with queues of late work, vector clocks, allocations, and the race detector.
//
// Every stream has a vector clock; each operation ticks its stream's own entry, an event copies a clock, a wait takes the
// larger of two, entry by entry. An access that is not ordered after an earlier conflicting one to the same allocation
// is a race (the method of torch.cuda._sanitizer), whatever happened to come first in this run.
#pragma once

#include <ATen/ATen.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace fakecuda {

namespace py = pybind11;
using at::Tensor;

constexpr size_t kArenaBytes = size_t(24) << 30;
// The default stream and as many as torch's own pool gives out in turn.
constexpr int kPoolStreams = 32;
constexpr int kMaxStreams = kPoolStreams + 1;
using Clock = std::vector<int64_t>;

// The last operation that touched an allocation from one stream.
struct Access {
  int stream = -1;
  int64_t at = 0;  // the stream's own time
  std::string op;
};

// An allocation of device memory.
struct Block {
  char* dev = nullptr;  // what tensors see; never readable by host code
  size_t nbytes = 0;    // asked for
  size_t size = 0;      // rounded
  int stream = 0;       // of the allocation
  bool recorded = false;  // record_stream was called: the memory is not given out again
  int64_t id = 0;
  Access write;
  std::map<int, Access> reads;  // by stream, since the last write
  Clock freed;  // what the thread that freed it had seen
};

// One recording of an event.
struct Version {
  int stream = 0;
  Clock clock;
  bool done = false;
  int64_t done_ns = 0;
  int64_t due_ns = 0;
};

struct Event {
  std::shared_ptr<Version> version;
};

// Work that a stream still has to do.
struct Op {
  enum Kind { Copy, Record, Wait } kind;
  void* dst = nullptr;
  const void* src = nullptr;
  size_t nbytes = 0;
  int64_t due_ns = 0;
  std::shared_ptr<Version> version;
  Tensor keep;  // torch's own pinned memory is not reused before the copy (CachingHostAllocator)
};

// A late copy that uses host memory, until the host knows that it is over.
struct Flight {
  char* host;
  size_t nbytes;
  int stream;
  int64_t at;
  bool reads_host;
};

struct StreamState {
  Clock clock = Clock(kMaxStreams, 0);
  std::deque<Op> queue;
};

struct World {
  std::recursive_mutex lock;
  char* dev = nullptr;    // PROT_NONE: host code that follows a device pointer is a SIGSEGV
  char* alias = nullptr;  // the same bytes at a constant distance, for the kernels
  size_t top = 4096;
  std::map<std::pair<int, size_t>, std::vector<Block*>> free_blocks;  // by stream and size
  size_t allocated_bytes = 0, peak_bytes = 0, reserved_bytes = 0, limit_bytes = size_t(8) << 30;
  int64_t next_id = 1;
  StreamState streams[kMaxStreams];
  int num_streams = 1;
  Clock host = Clock(kMaxStreams, 0);  // how far any thread of the host knows each stream to be
  std::vector<std::string> races;
  std::set<std::string> race_keys;
  std::map<std::string, int64_t> waits, fallbacks;
  std::map<std::string, int64_t> copied_bytes;  // "H2D" and "D2H"
  std::map<char*, size_t> pinned;
  std::vector<Flight> flights;
  int64_t lag_ns = 3'000'000;
  bool raises = false, strict_devices = true, poisons = true;
  int64_t num_late_copies = 0, num_launches = 0;
  std::function<void(const std::string&, const std::string&)> hook;  // called with the GIL
  std::mt19937_64 dice{0};
};

inline World W;
inline thread_local int t_stream = 0;
// How far this thread knows each stream to be: what it launches comes after that. What another thread has seen orders
// nothing here, however slow this one is.
inline thread_local Clock t_host = Clock(kMaxStreams, 0);

// Whoever has the lock may need the GIL (torch counts references of tensors that Python knows): so nobody waits for the
// lock with the GIL in hand.
struct Hold {
  Hold() {
    if (W.lock.try_lock()) return;
    if (PyGILState_Check()) {
      Py_BEGIN_ALLOW_THREADS W.lock.lock();
      Py_END_ALLOW_THREADS
    } else {
      W.lock.lock();
    }
  }
  ~Hold() { W.lock.unlock(); }
};

inline int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

inline char* to_alias(const void* p) {
  auto c = (char*)p;
  TORCH_CHECK(c >= W.dev && c < W.dev + kArenaBytes, "fakecuda: not a device pointer");
  return W.alias + (c - W.dev);
}

inline void merge(Clock& into, const Clock& other) {
  for (int i = 0; i < kMaxStreams; i++) into[i] = std::max(into[i], other[i]);
}

// The calling thread has seen that everything up to here is over.
inline void host_knows(const Clock& over) {
  merge(W.host, over);
  merge(t_host, over);
}

// ---- late work -----------------------------------------------------------------------------------------------------

void drain(int stream, const Version* until = nullptr);

inline void run_one(int stream) {
  auto& queue = W.streams[stream].queue;
  Op op = std::move(queue.front());
  queue.pop_front();
  switch (op.kind) {
    case Op::Copy:
      memcpy(op.dst, op.src, op.nbytes);
      break;
    case Op::Record:
      op.version->done = true;
      op.version->done_ns = now_ns();
      break;
    case Op::Wait:
      if (!op.version->done) drain(op.version->stream, op.version.get());
      break;
  }
}

inline void drain(int stream, const Version* until) {
  auto& queue = W.streams[stream].queue;
  while (!queue.empty() && !(until && until->done)) run_one(stream);
}

inline void launch(int stream) {  // a new operation on a stream
  auto& state = W.streams[stream];
  merge(state.clock, t_host);
  state.clock[stream]++;
  W.num_launches++;
}

inline void host_waits_for(int stream) {
  drain(stream);
  host_knows(W.streams[stream].clock);
}

// ---- races ---------------------------------------------------------------------------------------------------------

inline thread_local std::vector<std::string> t_races;  // told once the lock is free: the hook takes the GIL

inline void call_hook(const std::string& kind, const std::string& what) {
  if (!W.hook) return;
  py::gil_scoped_acquire gil;
  W.hook(kind, what);
}

inline void tell_races() {
  if (t_races.empty()) return;
  std::vector<std::string> told;
  told.swap(t_races);
  for (auto& text : told) call_hook("race", text);
  if (W.raises) TORCH_CHECK(false, "fakecuda race: ", told[0]);
}

inline void note_race(const std::string& key, const std::string& text) {
  if (!W.race_keys.insert(key).second) return;
  W.races.push_back(text);
  t_races.push_back(text);
}

inline bool is_ordered(const Access& before, const Clock& now) {
  return before.stream < 0 || now[before.stream] >= before.at;
}

inline void report(const Block* block, const Access& old, const char* old_kind, const Access& fresh, const char* kind) {
  auto with = [](const Access& access, const char* what) {
    return std::string(what) + " by " + access.op + " on stream " + std::to_string(access.stream);
  };
  std::string text = with(fresh, kind) + " is not ordered after " + with(old, old_kind);
  note_race(text, text + " (" + std::to_string(block->nbytes) + " bytes, allocation " + std::to_string(block->id) + ")");
}

// An operation of a stream uses an allocation.
inline void touch(Block* block, int stream, bool writes, const std::string& op) {
  if (!block) return;
  const Clock& clock = W.streams[stream].clock;
  Access access{stream, clock[stream], op};
  if (!is_ordered(block->write, clock)) report(block, block->write, "write", access, writes ? "write" : "read");
  if (writes) {
    for (auto& [other, read] : block->reads)
      if (!is_ordered(read, clock)) report(block, read, "read", access, "write");
    block->reads.clear();
    block->write = access;
  } else {
    block->reads[stream] = access;
  }
}

// Host code is about to use host memory: no copy that the host does not know to be over may be using it.
inline void host_access(char* start, size_t nbytes, bool writes, const std::string& who) {
  {
    Hold held;
    auto& flights = W.flights;
    auto landed = [](const Flight& flight) { return W.host[flight.stream] >= flight.at; };
    flights.erase(std::remove_if(flights.begin(), flights.end(), landed), flights.end());
    for (auto& flight : flights) {
      if (start >= flight.host + flight.nbytes || flight.host >= start + nbytes || (!writes && flight.reads_host))
        continue;
      std::string text = std::string("host ") + (writes ? "write" : "read") + " by " + who + " while a copy on stream " +
          std::to_string(flight.stream) + (flight.reads_host ? " reads" : " writes") + " it (" +
          std::to_string(flight.nbytes) + " bytes)";
      note_race(text, text);
    }
  }
  tell_races();
}

}  // namespace fakecuda
