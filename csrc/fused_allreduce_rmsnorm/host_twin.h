// The names of ptx.cuh for a C++ compiler, so that tests run the kernel as threads: ranks x blocks x threads.
// A copy_async reads when it is issued and again when it is waited for, which is when what it brings is there; until then
// that is a NaN, as is what was not wanted. So copying too early, too late and reading too early all show.
#pragma once

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#define DEVICE inline

using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i64 = std::int64_t;

struct alignas(16) Vec {
  u32 word[4];
};

namespace host {

class Barrier {
 public:
  explicit Barrier(int threads) { pthread_barrier_init(&barrier, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier); }
  void wait() { pthread_barrier_wait(&barrier); }

 private:
  pthread_barrier_t barrier;
};

// What the threads of a block share.
struct Block {
  Block(int threads, int shared_bytes)
      : shared(shared_bytes / sizeof(Vec) + 1), votes(threads), all(threads), lanes(threads), warps((threads + 31) / 32) {
    for (auto& warp : warps) warp = std::make_unique<Barrier>(32);
  }

  Barrier& some(int number, int threads) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!named[number]) named[number] = std::make_unique<Barrier>(threads);
    return *named[number];
  }

  std::vector<Vec> shared;
  std::vector<char> votes;
  Barrier all;
  std::vector<float> lanes;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::unique_ptr<Barrier> named[16];
  std::mutex mutex;
};

struct Thread {
  Block* block_state;
  int thread, block, blocks, virtual_rank;
  std::vector<std::pair<void*, const void*>> copies;
  std::deque<std::vector<std::pair<void*, const void*>>> groups;
};

inline thread_local Thread me;

inline void wait_copies(std::size_t pending) {
  while (me.groups.size() > pending) {
    for (auto [to, from] : me.groups.front()) *static_cast<Vec*>(to) = *static_cast<const Vec*>(from);
    me.groups.pop_front();
  }
}

// The one multicast mapping of a process: `size` addresses from `base` stand for the same places of every rank.
struct Multicast {
  const char* base = nullptr;
  u64 size = 0;
  std::vector<char*> ranks;
};

inline Multicast multicast;

inline std::vector<char*> places(const void* address) {
  u64 offset = static_cast<const char*>(address) - multicast.base;
  if (offset >= multicast.size) std::abort();
  std::vector<char*> all;
  for (char* rank : multicast.ranks) all.push_back(rank + offset);
  return all;
}

// Run `kernel` as blocks x threads, and come back when all have.
inline void launch(int blocks, int threads, int shared_bytes, int virtual_rank, const std::function<void()>& kernel) {
  std::vector<std::unique_ptr<Block>> states;
  std::vector<std::thread> running;
  for (int block = 0; block < blocks; ++block) {
    states.push_back(std::make_unique<Block>(threads, shared_bytes));
    for (int thread = 0; thread < threads; ++thread)
      running.emplace_back([=, state = states.back().get(), &kernel] {
        me = Thread{state, thread, block, blocks, virtual_rank, {}, {}};
        kernel();
        wait_copies(0);
      });
  }
  for (auto& thread : running) thread.join();
}

inline float as_float(u32 bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline u32 as_bits(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline u32 bf16(float x) {  // to the nearest, ties to even
  u32 bits = as_bits(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline u32 f16(float x) {
  _Float16 half = static_cast<_Float16>(x);
  std::uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

inline float from_f16(u32 bits) {
  std::uint16_t low = static_cast<std::uint16_t>(bits);
  _Float16 half;
  std::memcpy(&half, &low, 2);
  return static_cast<float>(half);
}

constexpr Vec UNWANTED{{0x7fffffffu, 0x7fffffffu, 0x7fffffffu, 0x7fffffffu}};

// What the switch does: values of all ranks widened, added, rounded once.
template <class Sum>
void ld_reduce(Vec& v, const void* address, bool wanted, Sum sum) {
  v = UNWANTED;
  if (!wanted) return;
  std::vector<Vec> parts;
  for (char* place : places(address)) parts.push_back(*reinterpret_cast<Vec*>(place));
  for (int i = 0; i < 4; ++i) v.word[i] = sum(parts, i);
}

}  // namespace host

namespace ptx {

DEVICE int thread() { return host::me.thread; }
DEVICE int block() { return host::me.block; }
DEVICE int blocks() { return host::me.blocks; }
DEVICE int virtual_rank() { return host::me.virtual_rank; }
DEVICE void* shared() { return host::me.block_state->shared.data(); }

DEVICE Vec load_constant(const void* address) { return *static_cast<const Vec*>(address); }
DEVICE void prefetch(const void* address) { (void)*static_cast<const volatile char*>(address); }
DEVICE void store(void* address, Vec v) { *static_cast<Vec*>(address) = v; }

DEVICE void copy_async(void* to_shared, const void* from) {
  *static_cast<Vec*>(to_shared) = host::UNWANTED;
  prefetch(from);
  host::me.copies.emplace_back(to_shared, from);
}

DEVICE void end_group_of_copies() {
  host::me.groups.push_back(std::move(host::me.copies));
  host::me.copies.clear();
}

template <int PENDING>
DEVICE void wait_copies() {
  host::wait_copies(PENDING);
}

DEVICE void ld_reduce_bf16(Vec& v, const void* address, bool wanted) {
  host::ld_reduce(v, address, wanted, [](const std::vector<Vec>& parts, int i) {
    float low = 0, high = 0;
    for (const Vec& part : parts) {
      low += host::as_float(part.word[i] << 16);
      high += host::as_float(part.word[i] & 0xffff0000u);
    }
    return host::bf16(low) | host::bf16(high) << 16;
  });
}

DEVICE void ld_reduce_f16(Vec& v, const void* address, bool wanted) {
  host::ld_reduce(v, address, wanted, [](const std::vector<Vec>& parts, int i) {
    float low = 0, high = 0;
    for (const Vec& part : parts) {
      low += host::from_f16(part.word[i]);
      high += host::from_f16(part.word[i] >> 16);
    }
    return host::f16(low) | host::f16(high) << 16;
  });
}

DEVICE void ld_reduce_f32(Vec& v, const void* address, bool wanted) {
  host::ld_reduce(v, address, wanted, [](const std::vector<Vec>& parts, int i) {
    float sum = 0;
    for (const Vec& part : parts) sum += host::as_float(part.word[i]);
    return host::as_bits(sum);
  });
}

DEVICE void multimem_store(void* address, Vec v) {
  for (char* place : host::places(address)) *reinterpret_cast<Vec*>(place) = v;
}

DEVICE void fence_alias() {}

DEVICE void store_release(u64* address, u64 value) { __atomic_store_n(address, value, __ATOMIC_RELEASE); }
DEVICE u64 load_acquire(const u64* address) { return __atomic_load_n(address, __ATOMIC_ACQUIRE); }
DEVICE bool claim(u64* address) { return __atomic_exchange_n(address, 1, __ATOMIC_ACQ_REL) == 0; }
DEVICE u64 now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
DEVICE void pause() { std::this_thread::sleep_for(std::chrono::microseconds(20)); }

DEVICE void sync_block() { host::me.block_state->all.wait(); }

DEVICE bool all_of_block(bool vote) {
  host::Block& block = *host::me.block_state;
  block.votes[thread()] = vote;
  block.all.wait();
  bool all = true;
  for (char each : block.votes) all = all && each;
  block.all.wait();
  return all;
}

DEVICE void sync_some(int barrier, int threads) { host::me.block_state->some(barrier, threads).wait(); }

DEVICE float sum_of_warp(float value) {
  host::Block& block = *host::me.block_state;
  host::Barrier& warp = *block.warps[thread() / 32];
  float* lanes = &block.lanes[thread() / 32 * 32];
  lanes[thread() % 32] = value;
  warp.wait();
  float sums[32];
  std::memcpy(sums, lanes, sizeof sums);
  warp.wait();
  for (int distance = 16; distance > 0; distance /= 2)  // the first lane's sum; the other lanes add the same pairs
    for (int lane = 0; lane < distance; ++lane) sums[lane] += sums[lane + distance];
  return sums[0];
}

DEVICE void forget(Vec&) {}
DEVICE float reciprocal_sqrt(float x) { return 1.0f / std::sqrt(x); }
DEVICE u32 bits(float x) { return host::as_bits(x); }
DEVICE float from_bits(u32 x) { return host::as_float(x); }
DEVICE u32 pack_bf16(float low, float high) { return host::bf16(low) | host::bf16(high) << 16; }
DEVICE u32 pack_f16(float low, float high) { return host::f16(low) | host::f16(high) << 16; }
DEVICE float low_f16(u32 word) { return host::from_f16(word); }
DEVICE float high_f16(u32 word) { return host::from_f16(word >> 16); }

}  // namespace ptx
