// Operators. A few are written out because they are about memory and time; every other one is the CPU's kernel of the same
// operator, run on the alias mapping of its arguments' memory by one boxed fallback.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <unordered_map>

#include "device.h"

namespace fakecuda {

using torch::jit::Stack;

Tensor empty_memory_format(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                           std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &g_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}
Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &g_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           dtype.value_or(at::get_default_dtype_as_scalartype()));
}
struct Aliases {  // CPU tensors over the same memory; one per tensor, one storage per storage
  std::unordered_map<c10::StorageImpl*, c10::Storage> storages;
  std::unordered_map<c10::TensorImpl*, Tensor> tensors;
  std::unordered_map<void*, Tensor> by_memory;
  Tensor of(const Tensor& t) {
    auto found = tensors.find(t.unsafeGetTensorImpl());
    if (found != tensors.end()) return found->second;
    auto impl = t.storage().unsafeGetStorageImpl();
    auto it = storages.find(impl);
    if (it == storages.end()) {
      auto dev = impl->mutable_data();
      void* host = dev ? (void*)to_alias(dev) : nullptr;
      c10::Storage st(c10::Storage::use_byte_size_t(), impl->nbytes(),
                      c10::DataPtr(host, host, [](void*) {}, c10::Device(DeviceType::CPU)), c10::GetAllocator(DeviceType::CPU), true);
      it = storages.emplace(impl, st).first;
      if (host) by_memory[host] = t;
    }
    auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(it->second),
        c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
    tensors.emplace(t.unsafeGetTensorImpl(), made);
    return made;
  }
};
Tensor alias_of(const Tensor& t) {
  Aliases a;
  return a.of(t);
}

const Tensor& resize_(const Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  Hold held;
  auto impl = self.unsafeGetTensorImpl();
  int64_t n = c10::multiply_integers(size);
  size_t need = (size_t)(n + self.storage_offset()) * self.element_size();
  auto st = self.storage().unsafeGetStorageImpl();
  if (n && need > st->nbytes()) {
    auto fresh = g_allocator.allocate(need);
    if (st->nbytes()) {
      drain(t_stream);
      memcpy(to_alias(fresh.get()), to_alias(st->data()), st->nbytes());
    }
    st->set_data_ptr_noswap(std::move(fresh));
    st->set_nbytes(need);
  }
  impl->set_sizes_contiguous(size);
  return self;
}

Tensor& copy_(Tensor& self, const Tensor& src, bool non_blocking) {
  if (self.is_same(src) || src.numel() == 0) return self;
  std::string what;
  {
    Hold held;
    int s = t_stream;
    launch(s);
    bool to = self.is_cuda(), from = src.is_cuda();
    if (to) touch(block_of(self), s, true, "copy_");
    if (from) touch(block_of(src), s, false, "copy_");
    bool plain = self.dtype() == src.dtype() && self.is_contiguous() && src.is_contiguous() &&
        self.numel() == src.numel() && self.sizes() == src.sizes();
    const Tensor& host = to ? src : self;
    if (to != from) W.copied_bytes[to ? "H2D" : "D2H"] += self.nbytes();
    bool pinned = to != from && is_pinned(host.const_data_ptr());
    if (to != from && non_blocking && pinned && plain) {
      Op op{Op::Copy};
      char* dst = (char*)self.mutable_data_ptr();
      const char* from_p = (const char*)src.const_data_ptr();
      op.dst = to ? to_alias(dst) : dst;
      op.src = from ? to_alias(from_p) : from_p;
      op.nbytes = self.nbytes();
      op.due_ns = now_ns() + W.lag_ns / 2 + (W.lag_ns ? (int64_t)(W.dice() % (uint64_t)W.lag_ns) : 0);
      if (is_torchs_pinned(host)) op.keep = host;
      // Unless a copy before it on this stream still reads what is there: a stream keeps its order.
      bool still_read = false;
      for (const Op& earlier : W.streams[s].queue)
        still_read |= earlier.kind == Op::Copy && (char*)earlier.src < (char*)op.dst + op.nbytes &&
            (char*)op.dst < (char*)earlier.src + earlier.nbytes;
      if (W.poisons && !still_read) memset(op.dst, 0xFF, op.nbytes);
      W.streams[s].queue.push_back(op);
      W.flights.push_back({(char*)(to ? op.src : op.dst), op.nbytes, s, W.streams[s].clock[s], to});
      W.num_late_copies++;
      return self;
    }
    drain(s);
    Tensor a = to ? alias_of(self) : self, b = from ? alias_of(src) : src;
    {
      c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKeySet{c10::DispatchKey::AutocastCUDA, c10::DispatchKey::AutocastCPU});
      at::AutoDispatchBelowADInplaceOrView below;
      a.copy_(b.sizes() == a.sizes() ? b : b.expand_as(a));
    }
    if (to != from) {
      // Pageable or blocking: cudaMemcpyAsync + cudaStreamSynchronize in torch's copy kernel.
      what = std::string(to ? "H2D" : "D2H") + (non_blocking ? (pinned ? "" : " pageable") : " blocking");
      if (!non_blocking || from) {
        host_waits_for(s);
        count_wait(what);
      } else {
        what.clear();
      }
    }
  }
  tell_races();
  if (!what.empty()) call_hook("sync", what);
  return self;
}

Tensor addmm_dtype_impl(const Tensor& self, const Tensor& a, const Tensor& b, at::ScalarType out, const at::Scalar& beta,
                        const at::Scalar& alpha) {
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), "addmm.dtype: mat1 and mat2 must have one dtype");
  TORCH_CHECK(out == a.scalar_type() || (out == at::kFloat && (a.scalar_type() == at::kHalf || a.scalar_type() == at::kBFloat16)),
              "out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs");
  TORCH_CHECK(self.scalar_type() == out || self.scalar_type() == a.scalar_type(), "addmm.dtype: self dtype");
  // Products exact in fp32; a GPU rounds nothing either.
  return at::addmm(self.to(out), a.to(out), b.to(out), beta, alpha);
}
Tensor addmm_dtype(const Tensor& self, const Tensor& a, const Tensor& b, at::ScalarType out, const at::Scalar& beta,
                   const at::Scalar& alpha) {
  return addmm_dtype_impl(self, a, b, out, beta, alpha);
}
Tensor& addmm_dtype_out(const Tensor& self, const Tensor& a, const Tensor& b, at::ScalarType dtype, const at::Scalar& beta,
                        const at::Scalar& alpha, Tensor& out) {
  out.copy_(addmm_dtype_impl(self, a, b, dtype, beta, alpha));
  return out;
}

// CUDA's histc takes integers, the CPU's does not. Neither makes the host wait where the range is given.
Tensor histc(const Tensor& self, int64_t bins, const at::Scalar& min, const at::Scalar& max) {
  Tensor out;
  {
    Hold held;
    int s = t_stream;
    launch(s);
    drain(s);
    touch(block_of(self), s, false, "histc");
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor values = alias_of(self);
    bool is_float = at::isFloatingType(self.scalar_type());
    Tensor found = at::histc(is_float ? values : values.to(at::kDouble), bins, min, max).to(self.scalar_type());
    out = at::detail::empty_strided_generic(found.sizes(), found.strides(), &g_allocator,
        c10::DispatchKeySet(c10::DispatchKey::CUDA), found.scalar_type());
    touch(block_of(out), s, true, "histc");
    alias_of(out).copy_(found);
  }
  tell_races();
  return out;
}

void record_stream(Tensor& self, c10::Stream s) {
  Hold held;
  auto b = block_of(self);
  if (b && b->stream != (int)s.id()) b->recorded = true;
}

int64_t fused_sdp_choice(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                         std::optional<double>, bool) {
  return 0;  // math
}

// ---- every other operator

const std::set<std::string> kIndexers = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put",
    "aten::_unsafe_index", "aten::_unsafe_index_put", "aten::set_", "aten::_fused_adamw_", "aten::_fused_sgd_"};
const std::set<std::string> kSyncs = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::_unique2",
    "aten::unique_consecutive", "aten::unique_dim", "aten::masked_select", "aten::is_nonzero", "aten::bincount",
    "aten::repeat_interleave", "aten::histc", "aten::_unique", "aten::nonzero_numpy"};

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  std::string sync;
  const auto& schema = op.schema();
  const std::string name = schema.name();
  {
    Hold held;
    W.fallbacks[name]++;
    int s = t_stream;
    launch(s);
    drain(s);
    const auto& args = schema.arguments();
    const size_t num = args.size(), begin = stack->size() - num;
    Aliases aliases;
    std::vector<c10::IValue> originals(stack->begin() + begin, stack->end());
    std::vector<std::pair<Tensor, Tensor>> written;  // device tensor, its alias
    bool on_device = false, bool_index = false;
    std::string stranger;
    auto convert = [&](const Tensor& t, bool writes) -> Tensor {
      if (!t.defined()) return t;
      if (!t.is_cuda()) {
        if (t.is_cpu() && t.dim() > 0) stranger = c10::str(t.sizes(), " ", t.scalar_type());
        return t;
      }
      on_device = true;
      touch(block_of(t), s, writes, name);
      Tensor a = aliases.of(t);
      if (writes) written.emplace_back(t, a);
      return a;
    };
    for (size_t i = 0; i < num; i++) {
      const auto& v = originals[i];
      bool writes = args[i].alias_info() && args[i].alias_info()->isWrite();
      if (v.isTensor()) {
        (*stack)[begin + i] = convert(v.toTensor(), writes);
      } else if (v.isTensorList()) {
        c10::List<Tensor> list;
        for (const Tensor& t : v.toTensorVector()) list.push_back(convert(t, writes));
        (*stack)[begin + i] = list;
      } else if (v.isOptionalTensorList()) {
        c10::List<std::optional<Tensor>> list;
        for (const std::optional<Tensor>& t : v.toOptionalTensorVector()) {
          if (t && t->defined() && (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte)) bool_index = true;
          list.push_back(t ? std::optional<Tensor>(convert(*t, writes)) : t);
        }
        (*stack)[begin + i] = list;
      } else if (v.isDevice()) {
        (*stack)[begin + i] = c10::Device(DeviceType::CPU);
      } else if (v.isGenerator()) {
        auto gen = v.toGenerator();
        if (gen.device().is_cuda()) (*stack)[begin + i] = inner_of(gen);
        else TORCH_CHECK(false, "Expected a 'cuda' device type for generator but found 'cpu' (", name, ")");
      } else if (v.isNone() && args[i].name() == "generator") {
        (*stack)[begin + i] = inner_of(default_generator());
      }
    }
    if (W.strict_devices && on_device && !stranger.empty() && !kIndexers.count(name))
      TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (",
                  name, ", CPU tensor of shape ", stranger, ")");
    if (kSyncs.count(name) || bool_index) sync = name;
    std::optional<Tensor> saved_state;
    auto cpu_gen = at::detail::getDefaultCPUGenerator();
    if (name == "aten::native_dropout") {
      saved_state = cpu_gen.get_state();
      cpu_gen.set_state(inner_of(default_generator()).get_state());
    }
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    if (saved_state) {
      inner_of(default_generator()).set_state(cpu_gen.get_state());
      cpu_gen.set_state(*saved_state);
    }
    for (auto& [device, a] : written) {
      bool grown = a.storage().nbytes() && (!device.storage().nbytes() ||
          a.storage().data() != (const void*)to_alias(device.storage().data()));
      if (grown || a.sizes() != device.sizes() || a.strides() != device.strides()) {
        resize_(device, a.sizes(), std::nullopt);
        if (a.numel() && grown) alias_of(device).copy_(a);
      }
    }
    const auto& returns = schema.returns();
    const size_t first = stack->size() - returns.size();
    std::unordered_map<c10::TensorImpl*, Tensor> back;
    for (auto& [impl, a] : aliases.tensors) {
      auto t = Tensor(c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim_copy(impl));
      back.emplace(a.unsafeGetTensorImpl(), t);
    }
    auto give = [&](const Tensor& t) -> Tensor {
      if (!t.defined() || !t.is_cpu()) return t;
      auto known = back.find(t.unsafeGetTensorImpl());
      if (known != back.end()) return known->second;
      if (t.has_storage() && t.storage().nbytes()) {
        auto it = aliases.by_memory.find((void*)t.storage().data());
        if (it != aliases.by_memory.end()) {  // a view of an argument
          const Tensor& base = it->second;
          auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()),
              base.unsafeGetTensorImpl()->key_set(), t.dtype());
          view.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
          return view;
        }
      }
      if (!on_device && !originals.empty()) {
        bool asked = false;
        for (auto& v : originals) asked |= v.isDevice() && v.toDevice().is_cuda();
        if (!asked) return t;
      }
      Tensor out = at::detail::empty_strided_generic(t.sizes(), t.strides(), &g_allocator,
          c10::DispatchKeySet(c10::DispatchKey::CUDA), t.scalar_type());
      touch(block_of(out), s, true, name);
      if (t.numel()) alias_of(out).copy_(t);
      return out;
    };
    for (size_t i = 0; i < returns.size(); i++) {
      auto& v = (*stack)[first + i];
      if (v.isTensor()) {
        v = give(v.toTensor());
      } else if (v.isTensorList()) {
        c10::List<Tensor> list;
        for (const Tensor& t : v.toTensorVector()) list.push_back(give(t));
        v = list;
      }
    }
    if (!sync.empty() && on_device) {
      host_waits_for(s);
      count_wait(sync);
    } else {
      sync.clear();
    }
  }
  tell_races();
  if (!sync.empty()) call_hook("sync", sync);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty_memory_format);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("resize_", &resize_);
  m.impl("as_strided", [](const Tensor& t, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
    return at::native::as_strided_tensorimpl(t, size, stride, offset);
  });
  m.impl("view", [](const Tensor& t, c10::IntArrayRef size) { return at::native::view(t, size); });
  m.impl("_reshape_alias", [](const Tensor& t, c10::IntArrayRef size, c10::IntArrayRef stride) {
    return at::native::_reshape_alias(t, size, stride);
  });
  m.impl("set_.source_Storage_storage_offset",
         [](Tensor& t, c10::Storage st, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) -> Tensor& {
           auto impl = t.unsafeGetTensorImpl();
           impl->set_storage_keep_dtype(st);
           if (stride.data() == nullptr && !size.empty()) {
             impl->set_storage_offset(offset);
             impl->set_sizes_contiguous(size);
           } else {
             impl->set_sizes_and_strides(size, stride, offset);
           }
           return t;
         });
  m.impl("set_.source_Storage", [](Tensor& t, c10::Storage st) -> Tensor& {
    auto impl = t.unsafeGetTensorImpl();
    int64_t n = (int64_t)(st.nbytes() / t.element_size());
    impl->set_storage_keep_dtype(st);
    impl->set_storage_offset(0);
    impl->set_sizes_contiguous({n});
    return t;
  });
  m.impl("record_stream", &record_stream);
  m.impl("histc", &histc);
  m.impl("_fused_sdp_choice", &fused_sdp_choice);
  m.impl("addmm.dtype", &addmm_dtype);
  m.impl("addmm.dtype_out", &addmm_dtype_out);
  // A kernel on every device; where there is none, torch composes it of five, with temporaries that no GPU has.
  m.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace fakecuda
