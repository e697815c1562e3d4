/* mix: mixup or cutmix of a batch, with normalisation and cast. For channel c of sample i, j =
 * index[i]:
 *
 *   no index   out = s_c x_i + t_c
 *   mixup      out = (λ s_c) x_i + ((1-λ) s_c) x_j + t_c
 *   cutmix     out = s_c x_j + t_c inside the box, s_c x_i + t_c outside
 *
 * Bytes per element: reads x_i and x_j once (uint8: 1 each), writes the result once. The shift
 * comes in whole because λ t + (1-λ) t = t. Values are staged in L1 in blocks, so that each of the
 * conversions is a loop of its own that vectorises. */
#include "pages.h"
#include "vec.h"

namespace fastmp {
namespace FASTMP_TARGET {
namespace {

constexpr int64_t kBlock = 1024;  /* elements staged in L1 as fp32: 4 KiB a stream */
constexpr int64_t kGrain = 32768; /* elements worth a thread */

/* Factors of one channel of one sample: own x + partner x_j + shift. */
struct Affine {
  float own, partner, shift;
};

template <class In, class Out>
void blend(const In* x, const In* partner, Out* out, int64_t n, Affine k) {
  alignas(64) float a[kBlock], b[kBlock];
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t m = min_of(kBlock, n - at);
    widen(x + at, a, m);
    widen(partner + at, b, m);
    for (int64_t i = 0; i < m; ++i) a[i] = k.own * a[i] + k.partner * b[i] + k.shift;
    narrow(a, out + at, m);
  }
}

template <class In, class Out>
void copy(const In* x, Out* out, int64_t n, float scale, float shift) {
  alignas(64) float a[kBlock];
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t m = min_of(kBlock, n - at);
    widen(x + at, a, m);
    for (int64_t i = 0; i < m; ++i) a[i] = a[i] * scale + shift;
    narrow(a, out + at, m);
  }
}

/* Rows above and below the box are one contiguous range each; a row of the box is three. */
template <class In, class Out>
void paste(const In* x, const In* partner, Out* out, int64_t height, int64_t width,
           const int64_t* box, float scale, float shift) {
  const int64_t top = box[0], bottom = box[1], left = box[2], right = box[3];
  copy(x, out, top * width, scale, shift);
  for (int64_t row = top; row < bottom; ++row) {
    const int64_t at = row * width;
    copy(x + at, out + at, left, scale, shift);
    copy(partner + at + left, out + at + left, right - left, scale, shift);
    copy(x + at + right, out + at + right, width - right, scale, shift);
  }
  copy(x + bottom * width, out + bottom * width, (height - bottom) * width, scale, shift);
}

template <class In, class Out>
void mix_plane(const fastmp_mix_args& args, int64_t sample, int64_t channel) {
  const int64_t plane = args.height * args.width;
  const auto plane_of = [&](int64_t i) {
    return static_cast<const In*>(args.input) + (i * args.channels + channel) * plane;
  };
  const In* x = plane_of(sample);
  Out* out = static_cast<Out*>(args.output) + (sample * args.channels + channel) * plane;
  const float scale = args.scale == nullptr ? 1.0f : args.scale[channel];
  const float shift = args.shift == nullptr ? 0.0f : args.shift[channel];
  if (args.index == nullptr) {
    copy(x, out, plane, scale, shift);
  } else if (args.box != nullptr) {
    const int64_t* box = args.box + sample * args.box_stride;
    paste(x, plane_of(args.index[sample]), out, args.height, args.width, box, scale, shift);
  } else {
    const float lam = args.lam[sample * args.lam_stride];
    blend(x, plane_of(args.index[sample]), out, plane,
          Affine{lam * scale, (1.0f - lam) * scale, shift});
  }
}

template <class In, class Out>
int mix_as(const fastmp_mix_args& args) {
  const int64_t plane = max_of<int64_t>(1, args.height * args.width);
  hint_huge_pages(args.output,
                  args.batch * args.channels * plane * static_cast<int64_t>(sizeof(Out)));
  parallel_for(args.batch * args.channels, max_of<int64_t>(1, kGrain / plane),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   mix_plane<In, Out>(args, i / args.channels, i % args.channels);
                 }
               });
  return FASTMP_OK;
}

bool is_valid(const fastmp_mix_args& args) {
  if (!is_addressable(4, args.batch, args.channels, args.height, args.width)) return false;
  if (!is_addressable(32, args.batch)) return false;
  if (!is_float(args.input_dtype) && args.input_dtype != FASTMP_U8) return false;
  if (!is_float(args.output_dtype)) return false;
  if (!is_aligned(bytes_of(args.input_dtype), args.input)) return false;
  if (!is_aligned(bytes_of(args.output_dtype), args.output)) return false;
  if (!is_aligned(8, args.index, args.box)) return false;
  if (args.lam_stride < 0 || args.lam_stride > 1) return false;
  if (args.box_stride != 0 && args.box_stride != 4) return false;
  if (!is_aligned(4, args.lam, args.scale, args.shift)) return false;
  const int64_t numel = args.batch * args.channels * args.height * args.width;
  if (numel > 0 && (args.input == nullptr || args.output == nullptr)) return false;
  const int64_t bytes = numel * bytes_of(args.output_dtype);
  if (!disjoint(args.output, bytes, args.index, args.batch * 8)) return false;
  if (!disjoint(args.output, bytes, args.box, (args.box_stride == 0 ? 1 : args.batch) * 32)) {
    return false;
  }
  if (args.index != nullptr && args.box == nullptr && args.lam == nullptr) return false;
  for (int64_t i = 0; args.index != nullptr && i < args.batch; ++i) {
    if (args.index[i] < 0 || args.index[i] >= args.batch) return false;
    if (args.box == nullptr) continue;
    const int64_t* box = args.box + i * args.box_stride;
    if (box[0] < 0 || box[0] > box[1] || box[1] > args.height) return false;
    if (box[2] < 0 || box[2] > box[3] || box[3] > args.width) return false;
  }
  return true;
}

}  // namespace

int mix(const fastmp_mix_args* args) {
  if (!is_valid(*args)) return FASTMP_BAD_ARGUMENT;
  return with_float_type(args->output_dtype, [&](auto out) {
    typedef decltype(out) Out;
    if (args->input_dtype == FASTMP_U8) return mix_as<uint8_t, Out>(*args);
    return with_float_type(args->input_dtype,
                           [&](auto in) { return mix_as<decltype(in), Out>(*args); });
  });
}

}  // namespace FASTMP_TARGET
}  // namespace fastmp
