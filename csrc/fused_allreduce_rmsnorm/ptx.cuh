// PTX as named one-liners, and the few built-ins of CUDA that the kernel uses.
// With TOKENWEAVE_HOST defined, host_twin.h gives the same names to a C++ compiler, and a test runs the kernel as threads.
#pragma once

#ifdef TOKENWEAVE_HOST
#include "host_twin.h"
#else

#define DEVICE __device__ __forceinline__

using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct alignas(16) Vec {
  u32 word[4];
};

namespace ptx {

// -- where am I -------------------------------------------------------------------------------------------------------

DEVICE int thread() { return threadIdx.x; }
DEVICE int block() { return blockIdx.x; }
DEVICE int blocks() { return gridDim.x; }
DEVICE int virtual_rank() { return blockIdx.y; }  // 0, but where one launch plays several ranks

DEVICE void* shared() {
  extern __shared__ Vec dynamic_shared[];
  return dynamic_shared;
}

// -- memory, 16 bytes at a time ---------------------------------------------------------------------------------------

// Of a weight: the same for every row and every launch.
DEVICE Vec load_constant(const void* address) {
  Vec v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(address));
  return v;
}

DEVICE void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

DEVICE void store(void* address, Vec v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               ::"l"(address), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]) : "memory");
}

// Global to shared memory, past the registers. What a thread copied it may read after it has waited.
DEVICE void copy_async(void* to_shared, const void* from) {
  u32 to = static_cast<u32>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// The copies since the last call are one group.
DEVICE void end_group_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All groups are done, but for the PENDING youngest.
template <int PENDING>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// -- multicast: one address stands for the same place on every rank -----------------------------------------------------

// Nobody may look at `v` if it was not wanted: a branch around the load would make the thread wait for it at once.
#define TOKENWEAVE_LD_REDUCE(name, type)                                                              \
  DEVICE void name(Vec& v, const void* address, bool wanted) {                                                      \
    asm volatile("{ .reg .pred wanted; setp.ne.u32 wanted, %5, 0;"                                                  \
                 "  @wanted multimem.ld_reduce.relaxed.sys.global.add." type " {%0, %1, %2, %3}, [%4]; }"           \
                 : "+r"(v.word[0]), "+r"(v.word[1]), "+r"(v.word[2]), "+r"(v.word[3])                               \
                 : "l"(address), "r"(static_cast<u32>(wanted)));                                                    \
  }
TOKENWEAVE_LD_REDUCE(ld_reduce_bf16, "acc::f32.v4.bf16x2")
TOKENWEAVE_LD_REDUCE(ld_reduce_f16, "acc::f32.v4.f16x2")
TOKENWEAVE_LD_REDUCE(ld_reduce_f32, "v4.f32")

DEVICE void multimem_store(void* address, Vec v) {
  asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};"
               ::"l"(address), "f"(__uint_as_float(v.word[0])), "f"(__uint_as_float(v.word[1])),
               "f"(__uint_as_float(v.word[2])), "f"(__uint_as_float(v.word[3])) : "memory");
}

// Orders accesses through a multicast address and through the ordinary address of the same memory.
DEVICE void fence_alias() { asm volatile("fence.proxy.alias;" ::: "memory"); }

// -- signals between ranks ----------------------------------------------------------------------------------------------

DEVICE void store_release(u64* address, u64 value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

DEVICE u64 load_acquire(const u64* address) {
  u64 value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

// Of this GPU's own memory only: no read-modify-write ever crosses a link. True for the one caller that finds 0.
DEVICE bool claim(u64* address) { return atomicCAS(address, 0ull, 1ull) == 0; }

DEVICE u64 now_ns() {
  u64 ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

DEVICE void pause() {}

// -- threads of a block -------------------------------------------------------------------------------------------------

DEVICE void sync_block() { __syncthreads(); }
DEVICE bool all_of_block(bool vote) { return __syncthreads_and(vote); }
DEVICE void sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

DEVICE float sum_of_warp(float value) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  return value;
}

// -- numbers ------------------------------------------------------------------------------------------------------------

// The compiler may not keep what it has derived from `v`: widened values take twice the registers.
DEVICE void forget(Vec& v) {
  asm volatile("" : "+r"(v.word[0]), "+r"(v.word[1]), "+r"(v.word[2]), "+r"(v.word[3]));
}

DEVICE float reciprocal_sqrt(float x) { return rsqrtf(x); }
DEVICE u32 bits(float x) { return __float_as_uint(x); }
DEVICE float from_bits(u32 x) { return __uint_as_float(x); }

// Two values in one word, the first in the low half; to the nearest, ties to even.
DEVICE u32 pack_bf16(float low, float high) {
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

DEVICE u32 pack_f16(float low, float high) {
  u32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

DEVICE float low_f16(u32 word) {
  float x;
  asm("{ .reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(x) : "r"(word));
  return x;
}

DEVICE float high_f16(u32 word) {
  float x;
  asm("{ .reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high; }" : "=f"(x) : "r"(word));
  return x;
}

}  // namespace ptx

#endif
