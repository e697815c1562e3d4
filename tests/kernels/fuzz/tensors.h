/* fastmp_tensors() and fastmp_raise_versions() on lists of tensors of our own. */
#ifndef FASTMP_FUZZ_TENSORS_H
#define FASTMP_FUZZ_TENSORS_H

#include <string.h>

#include "../../../csrc/fastmp.h"
#include "input.h"

/* Stand-ins for torch's getters, on metadata of our own. A dtype or keys of 0 are a failed call. */
struct Metadata {
  int64_t keys, dtype, device, dim, sizes[4], strides[4], autograd;
};
static const Metadata& metadata_of(const void* handle) {
  return **static_cast<const Metadata* const*>(handle);
}
static int32_t get_data_ptr(const void* handle, const void** value) {
  *value = handle;
  return metadata_of(handle).keys == 0;
}
static int32_t get_dtype(const void* handle, int32_t* value) {
  *value = static_cast<int32_t>(metadata_of(handle).dtype);
  return metadata_of(handle).dtype == 0;
}
static int32_t get_device_index(const void* handle, int32_t* value) {
  *value = static_cast<int32_t>(metadata_of(handle).device);
  return 0;
}
static int32_t get_dim(const void* handle, int64_t* value) {
  *value = metadata_of(handle).dim;
  return 0;
}
static int32_t get_sizes(const void* handle, const int64_t** value) {
  *value = metadata_of(handle).sizes;
  return 0;
}
static int32_t get_strides(const void* handle, const int64_t** value) {
  *value = metadata_of(handle).strides;
  return 0;
}

static int64_t get_version(const void* handle) {
  return metadata_of(handle).keys;
}
static void raise_version(const void*) {}

struct List {
  int64_t length, *objects;
};
static intptr_t list_size(const void* list) {
  return static_cast<const List*>(list)->length;
}
static void* list_item(const void* list, intptr_t index) {
  return reinterpret_cast<void*>(static_cast<const List*>(list)->objects[index]);
}

static int64_t number_of(const void* address) {
  return static_cast<int64_t>(reinterpret_cast<intptr_t>(address));
}

/* Six tensors in two lists; an even one may have an odd one as its gradient. */
static int32_t fuzz_tensors(Input& in) {
  Metadata metadata[6], none;
  const Metadata* objects[6][2];
  int64_t ids[6], autograd[6][2];
  for (int i = 0; i < 6; ++i) {
    int64_t* words = &metadata[i].keys;
    for (size_t w = 0; w < sizeof(Metadata) / 8; ++w) words[w] = in.below(20);
    metadata[i].dim = in.below(5);
    metadata[i].autograd = in.one_in(4) ? 0 : number_of(autograd[i]);
    autograd[i][1] = number_of(in.one_in(3) ? &none : &metadata[i | 1]);
    objects[i][1] = &metadata[i];
    ids[i] = number_of(&objects[i]);
  }
  const List lists[2] = {{in.below(4), ids}, {in.below(4), ids + 3}};
  const int64_t list_ids[2] = {number_of(&lists[0]), number_of(&lists[1])};
  fastmp_tensors_args args;
  memset(&args, 0, sizeof(args));
  args.size = size_field(in, sizeof(args));
  args.lists = in.one_in(40) ? nullptr : list_ids;
  args.list_count = in.one_in(40) ? -1 : in.below(3);
  args.handle_offset = 8;
  args.autograd_offset = offsetof(Metadata, autograd);
  args.grad_offset = 8;
  args.no_grad = number_of(&none);
  const void* functions[10] = {reinterpret_cast<const void*>(get_data_ptr),
                               reinterpret_cast<const void*>(get_dtype),
                               reinterpret_cast<const void*>(get_device_index),
                               reinterpret_cast<const void*>(get_dim),
                               reinterpret_cast<const void*>(get_sizes),
                               reinterpret_cast<const void*>(get_strides),
                               reinterpret_cast<const void*>(list_size),
                               reinterpret_cast<const void*>(list_item),
                               reinterpret_cast<const void*>(get_version),
                               reinterpret_cast<const void*>(raise_version)};
  const void** fields[10] = {&args.get_data_ptr, &args.get_dtype, &args.get_device_index,
                             &args.get_dim,      &args.get_sizes, &args.get_strides,
                             &args.list_size,    &args.list_item, &args.get_version,
                             &args.raise_version};
  for (int i = 0; i < 10; ++i) *fields[i] = in.one_in(60) ? nullptr : functions[i];
  args.words = in.one_in(40) ? -1 : in.below(120);
  args.layout = static_cast<int64_t*>(in.buffer(args.words < 0 ? 0 : args.words, 8));
  args.with_grad = in.one_in(40) ? -1 : in.below(6);
  args.address_stride = in.one_in(40) ? 0 : 1 + in.below(3);
  const int64_t count = args.with_grad < 0 ? 0 : args.with_grad;
  args.addresses = static_cast<int64_t*>(in.buffer(count * args.address_stride, 8));
  args.handles = static_cast<int64_t*>(in.buffer(count, 8));
  args.write = in.below(2);
  const int32_t status = fastmp_tensors(&args);
  const bool separate = args.layout != args.addresses && args.layout != args.handles;
  if (status != FASTMP_OK || args.same == 0 || args.write == 0 || !separate) return status;
  args.write = 0; /* what was just written is the same */
  if (fastmp_tensors(&args) != FASTMP_OK || args.same == 0) abort();
  return fastmp_raise_versions(&args);
}

#endif
