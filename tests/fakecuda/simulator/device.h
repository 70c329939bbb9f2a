// What torch asks of a device backend: random numbers, streams and events, the hooks behind torch.cuda.
//
// That a guard is registered for CUDA makes autograd run backwards in a device thread of its own, as on a GPU.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <thread>

#include "memory.h"

namespace fakecuda {

using c10::DeviceType;

inline void count_wait(const std::string& what) { W.waits[what]++; }

struct Generator final : c10::GeneratorImpl {
  at::Generator inner;
  explicit Generator(uint64_t seed = 67280421310721ull)
      : c10::GeneratorImpl(c10::Device(DeviceType::CUDA, 0), c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        inner(at::make_generator<at::CPUGeneratorImpl>(seed)) {}
  void set_current_seed(uint64_t s) override { inner.set_current_seed(s); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    inner.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override {
    auto made = new Generator();
    made->inner = inner.clone();
    return made;
  }
};
inline at::Generator& default_generator() {
  static at::Generator g = at::make_generator<Generator>();
  return g;
}
inline at::Generator inner_of(const at::Generator& g) {
  return static_cast<Generator*>(g.unsafeGetGeneratorImpl())->inner;
}


struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr DeviceType D = DeviceType::CUDA;
  DeviceType type() const override { return D; }
  c10::Device exchangeDevice(c10::Device) const override { return {D, 0}; }
  c10::Device getDevice() const override { return {D, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream make(int s) const { return c10::Stream(c10::Stream::UNSAFE, {D, 0}, s); }
  c10::Stream getStream(c10::Device) const override { return make(t_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return make(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return getNewStream(d, 0); }
  c10::Stream getNewStream(c10::Device, int) const override {
    Hold held;
    // As in torch, streams are given out in turn.
    static int next = 0;
    int id = 1 + next++ % kPoolStreams;
    W.num_streams = std::max(W.num_streams, id + 1);
    return make(id);
  }
  c10::Stream exchangeStream(c10::Stream s) const override {
    auto old = make(t_stream);
    t_stream = (int)s.id();
    return old;
  }
  void destroyEvent(void* e, const c10::DeviceIndex) const noexcept override { delete (Event*)e; }
  void record(void** e, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag) const override {
    Hold held;
    if (!*e) *e = new Event;
    int id = (int)s.id();
    auto v = std::make_shared<Version>();
    launch(id);
    v->stream = id;
    v->clock = W.streams[id].clock;
    auto& q = W.streams[id].queue;
    if (q.empty()) {
      v->done = true;
      v->done_ns = now_ns();
    } else {
      v->due_ns = 0;
      for (auto& op : q) v->due_ns = std::max(v->due_ns, op.due_ns);
      Op op{Op::Record};
      op.version = v;
      op.due_ns = v->due_ns;
      q.push_back(op);
    }
    ((Event*)*e)->version = v;
  }
  void block(void* e, const c10::Stream& s) const override {
    Hold held;
    if (!e || !((Event*)e)->version) return;
    auto v = ((Event*)e)->version;
    int id = (int)s.id();
    merge(W.streams[id].clock, v->clock);
    if (!v->done || !W.streams[id].queue.empty()) {
      Op op{Op::Wait};
      op.version = v;
      op.due_ns = v->due_ns;
      W.streams[id].queue.push_back(op);
    }
  }
  bool queryEvent(void* e) const override {
    Hold held;
    if (!e || !((Event*)e)->version) return true;
    auto v = ((Event*)e)->version;
    if (!v->done && now_ns() < v->due_ns) return false;
    if (!v->done) drain(v->stream, v.get());
    host_knows(v->clock);
    return true;
  }
  // The host sleeps until the event is due, without the lock: what it waits for stays late for everybody else.
  void synchronizeEvent(void* e) const override {
    std::shared_ptr<Version> v;
    {
      Hold held;
      if (!e || !((Event*)e)->version) return;
      v = ((Event*)e)->version;
      count_wait("event.synchronize");
    }
    for (bool over = false; !over;) {
      int64_t left_ns;
      {
        Hold held;
        left_ns = v->due_ns - now_ns();
        over = v->done || left_ns <= 0;
        if (over) {
          if (!v->done) drain(v->stream, v.get());
          host_knows(v->clock);
        }
      }
      if (!over) std::this_thread::sleep_for(std::chrono::nanoseconds(left_ns));
    }
    call_hook("sync", "event.synchronize");
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream& s) const override {
    Hold held;
    return W.streams[s.id()].queue.empty();
  }
  void synchronizeStream(const c10::Stream& s) const override {
    {
      Hold held;
      host_waits_for((int)s.id());
      count_wait("stream.synchronize");
    }
    call_hook("sync", "stream.synchronize");
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    {
      Hold held;
      for (int s = 0; s < W.num_streams; s++) host_waits_for(s);
      count_wait("device.synchronize");
    }
    call_hook("sync", "device.synchronize");
  }
  void recordDataPtrOnStream(const c10::DataPtr& p, const c10::Stream& s) const override {
    Hold held;
    auto b = (Block*)p.get_context();
    if (b && b->stream != (int)s.id()) b->recorded = true;
  }
  double elapsedTime(void* a, void* b, const c10::DeviceIndex) const override {
    Hold held;
    auto x = ((Event*)a)->version, y = ((Event*)b)->version;
    TORCH_CHECK(x && y && x->done && y->done, "fakecuda: elapsed_time of an event that is not over");
    return (float)((y->done_ns - x->done_ns) / 1e6);
  }
};
static const c10::impl::DeviceGuardImplRegistrar g_guard(c10::DeviceType::CUDA, new Guard());

struct Hooks final : at::CUDAHooksInterface {
  Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  bool isPinnedPtr(const void* p) const override { return is_pinned(p); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &g_pinned; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &g_allocator; }
  c10::Device getDeviceFromPtr(void*) const override { return {DeviceType::CUDA, 0}; }
  void deviceSynchronize(c10::DeviceIndex) const override {
    Hold held;
    for (int s = 0; s < W.num_streams; s++) host_waits_for(s);
  }
};

}  // namespace fakecuda

// Torch looks its hooks up by this name.
namespace at {
using CUDAHooks = fakecuda::Hooks;
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at
