// The fused kernel, held to a time: its blocks stay on their SMs until a wire would have been done. Appended to
// `#include "kernel.cuh"` by stand_in_kernel.py.
namespace tokenweave {

struct Held {
  Launch launch;
  u64 wire_ns;  // from the start of a block to its end, at least
};

template <class S>
DEVICE void held_to_wire(const Held& held) {
  u64 start_ns = ptx::now_ns();
  fused_allreduce_rmsnorm<S>(held.launch);
  if (ptx::thread() > 0) return;  // one thread keeps the block's registers and shared memory taken
  // Bounded by looks as well, each of which takes 8 ns and more: the clock is set now and then.
  for (u64 looks = held.wire_ns / 8; looks > 0; --looks) {
    i64 passed_ns = ptx::now_ns() - start_ns;
    if (passed_ns >= static_cast<i64>(held.wire_ns)) return;
#ifndef TOKENWEAVE_HOST
    asm volatile("nanosleep.u32 100;");
#endif
  }
}

}  // namespace tokenweave
