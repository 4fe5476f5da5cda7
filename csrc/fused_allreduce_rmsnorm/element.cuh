// The dtypes: how a 16-byte vector is widened to fp32 and rounded back, and summed by the switch.
#pragma once

#include "ptx.cuh"

namespace tokenweave {

template <int WIDTH>
struct Wide {
  float value[WIDTH];
};

struct Bf16 {
  static constexpr int BYTES = 2, WIDTH = 8;

  static DEVICE Wide<WIDTH> widen(Vec v) {
    Wide<WIDTH> wide;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wide.value[2 * i] = ptx::from_bits(v.word[i] << 16);
      wide.value[2 * i + 1] = ptx::from_bits(v.word[i] & 0xffff0000u);
    }
    return wide;
  }

  static DEVICE Vec round(Wide<WIDTH> wide) {
    Vec v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.word[i] = ptx::pack_bf16(wide.value[2 * i], wide.value[2 * i + 1]);
    return v;
  }

  static DEVICE void ld_reduce(Vec& v, const void* address, bool wanted) { ptx::ld_reduce_bf16(v, address, wanted); }
};

struct F16 {
  static constexpr int BYTES = 2, WIDTH = 8;

  static DEVICE Wide<WIDTH> widen(Vec v) {
    Wide<WIDTH> wide;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wide.value[2 * i] = ptx::low_f16(v.word[i]);
      wide.value[2 * i + 1] = ptx::high_f16(v.word[i]);
    }
    return wide;
  }

  static DEVICE Vec round(Wide<WIDTH> wide) {
    Vec v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.word[i] = ptx::pack_f16(wide.value[2 * i], wide.value[2 * i + 1]);
    return v;
  }

  static DEVICE void ld_reduce(Vec& v, const void* address, bool wanted) { ptx::ld_reduce_f16(v, address, wanted); }
};

struct F32 {
  static constexpr int BYTES = 4, WIDTH = 4;

  static DEVICE Wide<WIDTH> widen(Vec v) {
    Wide<WIDTH> wide;
#pragma unroll
    for (int i = 0; i < 4; ++i) wide.value[i] = ptx::from_bits(v.word[i]);
    return wide;
  }

  static DEVICE Vec round(Wide<WIDTH> wide) {
    Vec v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.word[i] = ptx::bits(wide.value[i]);
    return v;
  }

  static DEVICE void ld_reduce(Vec& v, const void* address, bool wanted) { ptx::ld_reduce_f32(v, address, wanted); }
};

}  // namespace tokenweave
