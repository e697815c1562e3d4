/* Layouts of Python's tensors and their gradients, and where those are: per tensor two words of
 * autograd's memory, and per layout six calls of torch's stable C ABI.
 *
 * The words of a list: its length. Of a tensor in it: its object, its address, its layout, whether
 * it has a gradient, and the layout of that. Of a layout: dispatch keys (backend, layout, sign,
 * subclass), dtype, device index, number of dimensions, size and stride of each. */
#include <string.h>

#include "../fastmp.h"

namespace fastmp {
namespace {

template <class Function>
Function* function(const void* address) {
  return reinterpret_cast<Function*>(const_cast<void*>(address));
}

/* Of torch/csrc/inductor/aoti_torch/c/shim.h; 0: no error. */
template <class Value>
bool get(const void* getter, const void* handle, Value* value) {
  return function<int32_t(const void*, Value*)>(getter)(handle, value) == 0;
}

const char* address_of(int64_t word) {
  return reinterpret_cast<const char*>(static_cast<intptr_t>(word));
}

int64_t number_of(const void* address) {
  return static_cast<int64_t>(reinterpret_cast<intptr_t>(address));
}

int64_t word_at(const void* memory, int64_t offset) {
  int64_t word;
  memcpy(&word, static_cast<const char*>(memory) + offset, sizeof(word));
  return word;
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
bool put_layout(const fastmp_tensors_args& args, const void* handle, Words& words) {
  if (!words.put(word_at(address_of(word_at(handle, 0)), args.keys_offset))) return false;
  int32_t dtype, device;
  int64_t dim, *sizes, *strides;
  const bool read = get(args.get_dtype, handle, &dtype) &&
                    get(args.get_device_index, handle, &device) &&
                    get(args.get_dim, handle, &dim) && get(args.get_sizes, handle, &sizes) &&
                    get(args.get_strides, handle, &strides);
  bool same = read && words.put(dtype) && words.put(device) && words.put(dim);
  for (int64_t d = 0; same && d < dim; ++d) same = words.put(sizes[d]) && words.put(strides[d]);
  return same;
}

/* The handle of its gradient; NULL: it has none. */
const void* gradient_of(const fastmp_tensors_args& args, const void* handle) {
  const int64_t autograd = word_at(address_of(word_at(handle, 0)), args.autograd_offset);
  if (autograd == 0) return nullptr;
  const char* grad = address_of(autograd) + args.grad_offset;
  return word_at(grad, 0) == args.no_grad ? nullptr : grad;
}

struct Reader {
  fastmp_tensors_args& args;
  Words words;
  int64_t found = 0; /* gradients */

  bool read_list(const void* list) {
    const int64_t length = function<intptr_t(const void*)>(args.list_size)(list);
    bool same = words.put(length);
    for (intptr_t i = 0; same && i < length; ++i) {
      same = read_tensor(function<const char*(const void*, intptr_t)>(args.list_item)(list, i));
    }
    return same;
  }

  bool read_tensor(const char* object) {
    if (!words.put(number_of(object))) return false;
    const char* handle = object + args.handle_offset;
    void *data, *grad_data;
    if (!put_layout(args, handle, words) || !get(args.get_data_ptr, handle, &data) ||
        !words.put(number_of(data))) {
      return false;
    }
    const void* grad = gradient_of(args, handle);
    if (!words.put(grad != nullptr)) return false;
    if (grad == nullptr) return true;
    if (found == args.with_grad || !put_layout(args, grad, words) ||
        !get(args.get_data_ptr, grad, &grad_data)) {
      return false;
    }
    args.version_sum += function<int64_t(const void*)>(args.get_version)(handle);
    args.addresses[found * args.address_stride] = number_of(grad_data);
    args.handles[found++] = number_of(handle);
    return true;
  }
};

bool is_valid(const fastmp_tensors_args* args) {
  if (args == nullptr || args->size != int64_t{sizeof(*args)}) return false;
  if (args->list_count < 0 || args->with_grad < 0 || args->words < 0) return false;
  if (args->address_stride < 1) return false;
  const void* const functions[] = {args->list_size,    args->list_item,        args->get_data_ptr,
                                   args->get_dtype,    args->get_dim,          args->get_sizes,
                                   args->get_strides,  args->get_device_index, args->get_version,
                                   args->raise_version};
  for (const void* address : functions) {
    if (address == nullptr) return false;
  }
  const int64_t* const arrays[] = {args->lists, args->layout, args->addresses, args->handles};
  for (const int64_t* words : arrays) {
    const bool is_aligned = reinterpret_cast<uintptr_t>(words) % alignof(int64_t) == 0;
    if (words == nullptr || !is_aligned) return false;
  }
  return true;
}

}  // namespace
}  // namespace fastmp

extern "C" int32_t fastmp_tensors(fastmp_tensors_args* args) {
  using namespace fastmp;
  if (!is_valid(args)) return FASTMP_BAD_ARGUMENT;
  Reader reader{*args, {args->layout, args->words, args->write != 0}};
  args->version_sum = 0;
  bool same = true;
  for (int64_t i = 0; same && i < args->list_count; ++i) {
    same = reader.read_list(address_of(args->lists[i]));
  }
  if (args->write != 0) args->words = reader.words.count;
  args->same = same && reader.words.count == args->words && reader.found == args->with_grad;
  return FASTMP_OK;
}

extern "C" int32_t fastmp_raise_versions(const fastmp_tensors_args* args) {
  using namespace fastmp;
  if (!is_valid(args)) return FASTMP_BAD_ARGUMENT;
  for (int64_t i = 0; i < args->with_grad; ++i) {
    function<void(const void*)>(args->raise_version)(address_of(args->handles[i]));
  }
  return FASTMP_OK;
}
