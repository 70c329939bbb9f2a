// A simulated NVIDIA GPU behind torch's *CUDA* dispatch key, for a CPU-only build of torch: the Python module.
//
// * Device pointers lie in address space that is PROT_NONE: any access by host code is a SIGSEGV. Kernels run on an alias
//   mapping at a constant distance, by the CPU kernel of the same operator, without copies.            memory.h, kernels.h
// * A device guard is registered, so autograd runs backward in a device thread of its own, as on a GPU.         device.h
// * Every pair of conflicting accesses that no event or synchronisation orders is reported as a race.            world.h
// * Copies with non_blocking=True between page-locked memory and the device are *late*: they run when something waits for
//   them, or some milliseconds after they were enqueued; the destination is filled with 0xFF until then.       kernels.h
// * What would make the host wait on a GPU is counted, with a Python hook to see where.
//
// Not simulated: speed, CUDA kernels, cuBLAS and flash attention, fragmentation, the driver.
#include <sys/mman.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

#include "kernels.h"

using namespace fakecuda;

namespace {

char* map_arena(int protection) {
  void* memory = mmap(nullptr, kArenaBytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("fakecuda: no address space for 24 GiB");
  return (char*)memory;
}

void forget_observations() {
  W.races.clear();
  W.race_keys.clear();
  W.flights.clear();
  W.waits.clear();
  W.fallbacks.clear();
  W.copied_bytes.clear();
  W.num_late_copies = W.num_launches = 0;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  W.dev = map_arena(PROT_NONE);
  W.alias = map_arena(PROT_READ | PROT_WRITE);
  c10::SetAllocator(DeviceType::CUDA, &g_allocator);
  py::call_guard<py::gil_scoped_release> no_gil;

  // Whole-process set-up.
  m.def("lazy_init", [] { at::globalContext().lazyInitDevice(DeviceType::CUDA); }, no_gil);
  m.def("set_options", [](int64_t lag_ns, bool raises, bool strict_devices, bool poisons) {
    W.lag_ns = lag_ns;
    W.raises = raises;
    W.strict_devices = strict_devices;
    W.poisons = poisons;
  }, no_gil);
  m.def("lag_ns", [] { Hold held; return W.lag_ns; }, no_gil);
  m.def("set_lag", [](int64_t lag_ns) { Hold held; return std::exchange(W.lag_ns, lag_ns); }, no_gil);
  m.def("set_limit", [](size_t nbytes) { W.limit_bytes = nbytes; }, no_gil);
  m.def("set_hook", [](py::object function) {
    if (function.is_none()) {
      W.hook = nullptr;
      return;
    }
    auto kept = std::make_shared<py::object>(function);
    W.hook = [kept](const std::string& kind, const std::string& what) { (*kept)(kind, what); };
  });

  // Observations.
  m.def("host_access", [](uintptr_t start, size_t nbytes, bool writes, const std::string& who) {
    host_access((char*)start, nbytes, writes, who);
  }, no_gil);
  m.def("races", [] { Hold held; return W.races; }, no_gil);
  m.def("waits", [] { Hold held; return W.waits; }, no_gil);
  m.def("fallbacks", [] { Hold held; return W.fallbacks; }, no_gil);
  m.def("copied_bytes", [] { Hold held; return W.copied_bytes; }, no_gil);
  m.def("num_late_copies", [] { Hold held; return W.num_late_copies; }, no_gil);
  m.def("clear", [] { Hold held; forget_observations(); }, no_gil);

  // Memory.
  m.def("allocated_bytes", [] { Hold held; return W.allocated_bytes; }, no_gil);
  m.def("peak_bytes", [] { Hold held; return W.peak_bytes; }, no_gil);
  m.def("reserved_bytes", [] { Hold held; return W.reserved_bytes; }, no_gil);
  m.def("limit_bytes", [] { Hold held; return W.limit_bytes; }, no_gil);
  m.def("reset_peak", [] { Hold held; W.peak_bytes = W.allocated_bytes; }, no_gil);
  m.def("host_register", [](uintptr_t p, size_t nbytes) { Hold held; W.pinned[(char*)p] = nbytes; return 0; }, no_gil);
  m.def("host_unregister", [](uintptr_t p) {
    size_t nbytes = 0;
    {
      Hold held;
      auto found = W.pinned.find((char*)p);
      if (found == W.pinned.end()) return 713;
      nbytes = found->second;
      W.pinned.erase(found);
    }
    // Whoever gives memory back may write to it next.
    host_access((char*)p, nbytes, true, "cudaHostUnregister");
    return 0;
  }, no_gil);

  // Random numbers and streams.
  m.def("default_generator", [] { return default_generator(); });
  m.def("get_rng_state", [] { return inner_of(default_generator()).get_state(); });
  m.def("set_rng_state", [](const Tensor& state) { inner_of(default_generator()).set_state(state); });
  m.def("manual_seed", [](int64_t seed) { inner_of(default_generator()).set_current_seed((uint64_t)seed); });
  m.def("current_stream_id", [] { return t_stream; });
  m.def("set_stream_id", [](int stream) { return std::exchange(t_stream, stream); });
}
