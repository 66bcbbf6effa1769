// Registers the operators of domain "u2moe" with onnxruntime, and exports the functions for hosts. See docs/kernels.md.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <type_traits>

#include "layout.h"
#include "operators/attention.h"
#include "exported.h"
#include "operators/experts.h"
#include "operators/first_convolutions.h"
#include "operators/normalizations.h"
#include "operators/products.h"
#include "operators/streamed_convolution.h"
#include "ort.h"

namespace u2moe {
namespace {

constexpr auto kAny = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;

// An operator's kernel, and the onnxruntime that created it.
template <class Op>
struct Kernel {
  const OrtApi* api;
  Op op;
  Kernel(const OrtApi* made_by, Node& node) : api(made_by), op(node) {}
};

// An operator registered under one name. It declares inputs of any type. The kernel checks the types when it is
// created, because its error messages are more specific than onnxruntime's.
template <class Op>
struct Registered : OrtCustomOp {
  std::string name;

  void fill(const std::string& with_number) {
    name = with_number;
    static_cast<OrtCustomOp&>(*this) = OrtCustomOp{};
    version = kApiVersion;
    GetName = [](const OrtCustomOp* self) { return static_cast<const Registered*>(self)->name.c_str(); };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
    GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
    GetInputType = [](const OrtCustomOp*, size_t) { return kAny; };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_VARIADIC; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return sizeof Op::kOutputs / sizeof kFloat; };
    GetOutputType = [](const OrtCustomOp*, size_t index) { return Op::kOutputs[index]; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi* api, const OrtKernelInfo* info, void** made) -> OrtStatusPtr {
      const std::string& called = static_cast<const Registered*>(self)->name;
      return guarded(api, called.c_str(), [&] {
        Node node(info);
        *made = new Kernel<Op>(api, node);
        node.give_back();
      });
    };
    KernelComputeV2 = [](void* made, OrtKernelContext* context) -> OrtStatusPtr {
      const auto* kernel = static_cast<const Kernel<Op>*>(made);
      return guarded(kernel->api, Op::kName, [&] { kernel->op.compute(Call(context)); });
    };
    KernelDestroy = [](void* made) { delete static_cast<Kernel<Op>*>(made); };
  }
};

// Returns whether a name is in a comma-separated list.
bool is_listed(const std::string& list, const std::string& name) {
  return ("," + list + ",").find("," + name + ",") != std::string::npos;
}

template <class Op>
void add(OrtCustomOpDomain* domain, const std::string& without) {
  static Registered<Op> registered[kNumbers];  // lives as long as the library
  static const bool is_filled = [] {
    for (size_t i = 0; i < kNumbers; i++)
      registered[i].fill(i ? std::string(Op::kName) + "_" + std::to_string(i + 1) : Op::kName);
    return true;
  }();
  (void)is_filled;
  for (Registered<Op>& op : registered)
    if (!is_listed(without, op.name)) Api::check(Api::get().CustomOpDomain_Add(domain, &op));
}

// Whether an operator needs activations up to 255. If the instruction set does not support them, onnxruntime runs the
// function that the operator replaces.
template <class Op>
constexpr bool kNeeds255 = std::is_same_v<Op, FirstConvolutions>;

template <class... Ops>
struct List {
  static_assert(sizeof...(Ops) == names::kCount, "not what runtime/bundle/functions.py declares");
  static void add_to(OrtCustomOpDomain* domain, const InstructionSet& isa, const std::string& without) {
    ((isa.holds_255 || !kNeeds255<Ops> ? add<Ops>(domain, without) : void()), ...);
  }
  static std::string names(const InstructionSet& isa) {
    std::string text;
    ((text += isa.holds_255 || !kNeeds255<Ops> ? (text.empty() ? "\"" : ", \"") + std::string(Ops::kName) + "\"" : ""),
     ...);
    return text;
  }
};
using Operators = List<Int8Experts, Int4Experts, Rows, MatMul, Linear, Int4Linear, FeedForward, GatedFeedForward,
                       Int4FeedForward, Int4GatedFeedForward, FirstConvolutions, CachedAttention, NextCache,
                       CachedConvolution, PlainNormalization, AddNormalization>;

// The domain of operators for one onnxruntime and one list of left-out operators. A process may contain several
// onnxruntimes, each with its own API. If two threads need a domain at the same time, both may create it.
struct Domain {
  const OrtApi* api;
  std::string without;
  OrtCustomOpDomain* made;
  Domain* next;
};
std::atomic<Domain*> domains{nullptr};  // not under a lock, because another thread could hold the lock during a fork

OrtCustomOpDomain* domain_of(const OrtApi* api, const std::string& without) {
  for (const Domain* domain = domains.load(std::memory_order_acquire); domain != nullptr; domain = domain->next)
    if (domain->api == api && domain->without == without) return domain->made;
  auto fresh = std::make_unique<Domain>(Domain{api, without, nullptr, nullptr});
  Api::check(api->CreateCustomOpDomain("u2moe", &fresh->made));
  Operators::add_to(fresh->made, isa(), without);
  fresh->next = domains.load(std::memory_order_relaxed);
  while (!domains.compare_exchange_weak(fresh->next, fresh.get(), std::memory_order_acq_rel)) {
  }
  return fresh.release()->made;
}

// Returns a comma-separated list of the operators that a session must not use. The session runs the graph's functions
// instead.
std::string left_out(const OrtSessionOptions* options) {
  constexpr const char* kKey = "u2moe.without";
  int is_there = 0;
  Api::check(Api::get().HasSessionConfigEntry(options, kKey, &is_there));
  if (!is_there) return "";
  size_t size = 0;
  Api::check(Api::get().GetSessionConfigEntry(options, kKey, nullptr, &size));
  std::string text(size, '\0');
  Api::check(Api::get().GetSessionConfigEntry(options, kKey, text.data(), &size));
  return text.c_str();
}

// Escapes text for a JSON string. The text may come from the environment.
std::string escaped(const char* text) {
  std::string found;
  for (; *text != '\0'; text++) {
    const auto character = static_cast<unsigned char>(*text);
    if (character < ' ' || character == '"' || character == '\\') {
      char code[8];
      std::snprintf(code, sizeof code, "\\u%04x", character);
      found += code;
    } else {
      found += *text;
    }
  }
  return found;
}

std::string description() {
  const char* message;
  const InstructionSet* chosen = instruction_set(&message);
  if (chosen == nullptr) return "{\"error\": \"" + escaped(message) + "\"}";
  const InstructionSet* sets[8];
  std::string names;
  for (size_t i = 0, count = available(sets); i < count; i++)
    names += (i ? ", \"" : "\"") + std::string(sets[i]->name) + "\"";
  return "{\"contract\": " + std::to_string(kContract) + ", \"isa\": \"" + chosen->name + "\", \"isas\": [" + names + "], \"api\": " +
         std::to_string(kApiVersion) + ", \"layout\": " + std::to_string(kLayout) +
         ", \"domain\": \"u2moe\", \"operators\": [" + Operators::names(*chosen) + "]}";
}

}  // namespace
}  // namespace u2moe

// Registers the operators. onnxruntime's `RegisterCustomOpsLibrary` calls this function.
U2MOE_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(u2moe::kApiVersion);
  if (api == nullptr)
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, "u2moe-kernels needs onnxruntime 1.17 or later");
  return u2moe::guarded(api, "u2moe-kernels", [&] {
    u2moe::isa();
    u2moe::Api::check(api->AddCustomOpDomain(options, u2moe::domain_of(api, u2moe::left_out(options))));
  });
}

// Writes the description of this library as JSON to `text` if it fits in `size` bytes. Returns the number of bytes
// needed, including a final zero.
U2MOE_EXPORT size_t u2moe_kernels_describe(char* text, size_t size) {
  try {
    const std::string found = u2moe::description();
    if (found.size() < size) std::memcpy(text, found.c_str(), found.size() + 1);
    return found.size() + 1;
  } catch (...) {
    return 0;
  }
}

// Packs a weight [k, n] for the operators, and returns the packed size in bytes. If `to` is null, only returns the size.
// `bias` may be null.
U2MOE_EXPORT size_t u2moe_kernels_pack_int8(const int8_t* weight, const float* scale, const float* bias, size_t k,
                                            size_t n, uint8_t* to) {
  if (to != nullptr) u2moe::pack8({weight, scale, bias, k, n}, to);
  return u2moe::packed_bytes8(k, n);
}

// Like the function above, but packs a 4-bit weight [n, groups, group / 2], given in the form that MatMulNBits reads.
U2MOE_EXPORT size_t u2moe_kernels_pack_int4(const uint8_t* weight, const uint8_t* step, const float* scale,
                                            const float* bias, size_t k, size_t n, size_t group, uint8_t* to) {
  if (to != nullptr) u2moe::pack4({weight, step, scale, bias, k, n, group}, to);
  return u2moe::packed_bytes4(k, n, group);
}
