/* Addresses and layouts of Python's tensors, by six calls of torch's stable C ABI for each.
 *
 * The words of a tensor: dispatch keys (backend, layout, sign, subclass), [object and address of a
 * fixed one], dtype, device index, number of dimensions, size and stride of each. */
#include <string.h>

#include "../fastmp.h"

namespace fastmp {
namespace {

/* Of torch/csrc/inductor/aoti_torch/c/shim.h; 0: no error. */
template <class Value>
using Getter = int32_t (*)(const void* handle, Value* value);

template <class Value>
bool get(const void* function, const void* handle, Value* value) {
  return reinterpret_cast<Getter<Value>>(const_cast<void*>(function))(handle, value) == 0;
}

int64_t word_at(const void* memory, int64_t offset) {
  int64_t word;
  memcpy(&word, static_cast<const char*>(memory) + offset, sizeof(word));
  return word;
}

const void* address_of(int64_t word) {
  return reinterpret_cast<const void*>(static_cast<intptr_t>(word));
}

/* The layout as it is written or compared, a word at a time. */
struct Words {
  int64_t* layout;
  int64_t capacity;
  bool write;
  int64_t count = 0;

  bool put(int64_t word) {
    if (count == capacity) return false;
    if (write) layout[count] = word;
    return layout[count++] == word;
  }
};

/* The keys first: torch reports a call that a sparse tensor, say, cannot answer on stderr. */
bool read_tensor(const fastmp_tensors_args& args, int64_t i, Words& words) {
  const void* object = address_of(args.objects[i]);
  const void* handle = static_cast<const char*>(object) + args.handle_offset;
  const void* metadata = address_of(word_at(handle, 0));
  if (!words.put(word_at(metadata, args.keys_offset))) return false;
  void* data;
  int32_t dtype, device;
  int64_t dim, *sizes, *strides;
  const bool read = get(args.get_data_ptr, handle, &data) && get(args.get_dtype, handle, &dtype) &&
                    get(args.get_device_index, handle, &device) &&
                    get(args.get_dim, handle, &dim) && get(args.get_sizes, handle, &sizes) &&
                    get(args.get_strides, handle, &strides);
  if (!read) return false;
  const int64_t address = static_cast<int64_t>(reinterpret_cast<intptr_t>(data));
  if (i >= args.fixed) {
    args.addresses[i - args.fixed] = address;
  } else if (!words.put(args.objects[i]) || !words.put(address)) {
    return false;
  }
  bool same = words.put(dtype) && words.put(device) && words.put(dim);
  for (int64_t d = 0; same && d < dim; ++d) same = words.put(sizes[d]) && words.put(strides[d]);
  return same;
}

}  // namespace
}  // namespace fastmp

extern "C" int32_t fastmp_tensors(fastmp_tensors_args* args) {
  using namespace fastmp;
  const bool readable = args != nullptr && args->size == int64_t{sizeof(*args)};
  if (!readable || args->fixed < 0 || args->bound < 0 || args->words < 0) {
    return FASTMP_BAD_ARGUMENT;
  }
  const void* const functions[] = {args->get_data_ptr, args->get_dtype, args->get_device_index,
                                   args->get_dim,      args->get_sizes, args->get_strides};
  for (const void* function : functions) {
    if (function == nullptr) return FASTMP_BAD_ARGUMENT;
  }
  const int64_t* const arrays[] = {args->objects, args->layout, args->addresses};
  for (const int64_t* words : arrays) {
    const bool is_aligned = reinterpret_cast<uintptr_t>(words) % alignof(int64_t) == 0;
    if (words == nullptr || !is_aligned) return FASTMP_BAD_ARGUMENT;
  }
  Words words{args->layout, args->words, args->write != 0};
  bool same = true;
  for (int64_t i = 0; same && i < args->fixed + args->bound; ++i) {
    same = read_tensor(*args, i, words);
  }
  if (args->write != 0) args->words = words.count;
  args->same = same && words.count == args->words;
  return FASTMP_OK;
}
