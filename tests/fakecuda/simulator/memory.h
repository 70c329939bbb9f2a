// Device memory and page-locked host memory: allocators that make mistakes visible.
//
// Freed device memory is poisoned and is the first to be given out again to its stream, as torch's caching allocator may.
#pragma once

#include "world.h"

namespace fakecuda {

inline Block* block_of(const c10::Storage& storage) {
  return storage.data_ptr() ? (Block*)storage.data_ptr().get_context() : nullptr;
}
inline Block* block_of(const Tensor& t) { return t.has_storage() ? block_of(t.storage()) : nullptr; }

inline void release(void* context) {
  auto block = (Block*)context;
  if (!block) return;
  Hold held;
  W.allocated_bytes -= block->size;
  block->freed = t_host;
  // Late copies into or out of it are still queued: a GPU would carry them out all the same.
  if (W.poisons && !block->recorded) memset(to_alias(block->dev), 0xFF, block->size);
  if (!block->recorded) W.free_blocks[{block->stream, block->size}].push_back(block);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    Hold held;
    c10::Device device(c10::DeviceType::CUDA, 0);
    if (nbytes == 0) return {nullptr, nullptr, &release, device};
    size_t size = (nbytes + 511) / 512 * 512;
    if (W.allocated_bytes + size > W.limit_bytes)
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory (simulated). Tried to allocate ", nbytes, " bytes; ",
                       W.allocated_bytes, " of ", W.limit_bytes, " in use");
    auto& pool = W.free_blocks[{t_stream, size}];
    Block* block;
    if (!pool.empty()) {
      block = pool.back();  // the one freed last: the most dangerous one
      pool.pop_back();
      merge(t_host, block->freed);  // freeing comes before giving out again, whichever threads do it
    } else {
      TORCH_CHECK(W.top + size < kArenaBytes, "fakecuda: arena exhausted");
      block = new Block;
      block->dev = W.dev + W.top;
      W.top += size;
      block->size = size;
      block->stream = t_stream;
      W.reserved_bytes += size;
      if (W.poisons) memset(to_alias(block->dev), 0xFF, size);
    }
    block->nbytes = nbytes;
    block->id = W.next_id++;
    W.allocated_bytes += size;
    W.peak_bytes = std::max(W.peak_bytes, W.allocated_bytes);
    return {block->dev, block, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* dst, const void* src, size_t nbytes) const override {
    memcpy(to_alias(dst), to_alias(src), nbytes);
  }
};
inline DeviceAllocator g_allocator;

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    auto memory = (char*)aligned_alloc(4096, (std::max<size_t>(nbytes, 1) + 4095) / 4096 * 4096);
    Hold held;
    W.pinned[memory] = nbytes;
    return {memory, memory, &drop, c10::Device(c10::DeviceType::CPU)};
  }
  static void drop(void* memory) {
    {
      Hold held;
      W.pinned.erase((char*)memory);
    }
    free(memory);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &drop; }
  void copy_data(void* dst, const void* src, size_t nbytes) const override { memcpy(dst, src, nbytes); }
};
inline PinnedAllocator g_pinned;

inline bool is_pinned(const void* p) {
  Hold held;
  auto it = W.pinned.upper_bound((char*)p);
  if (it == W.pinned.begin()) return false;
  --it;
  return (char*)p < it->first + it->second;
}
inline bool is_torchs_pinned(const Tensor& t) {
  return t.storage().data_ptr().get_deleter() == &PinnedAllocator::drop;
}

}  // namespace fakecuda
