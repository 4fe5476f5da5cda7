// AllReduce + residual + RMSNorm in one kernel. In torch, for the rows that this rank owns:
//
//   total    = sum over ranks of partial (+ bias)
//   total    = post_norm(total)                      POST_NORM
//   residual = residual + total                      RESIDUAL; else total
//   hidden   = norm(residual) or residual            NORM
//
// and then hidden is written to every rank. Sums and norms are fp32. Rounded is what is stored, what the switch has added,
// and a total before its post_norm; a norm takes its mean square from the values before they are rounded.
//
// A row belongs to a group of warps, and a block holds several groups, so that no step of a row stops the whole block.
// Loads are always in flight: as soon as a thread has consumed one vector of its row it issues the loads of the vector
// that is AHEAD of it, in this row or in its group's next one. What the switch adds can only arrive in registers; what
// peers hold arrives in shared memory, and so does the residual. A row stays in registers from the sum to the store.
#pragma once

#include "barrier.cuh"
#include "element.cuh"

namespace tokenweave {

// How ranks' values meet.
//   MULTIMEM  the switch adds, and copies to all ranks
//   TWO_SHOT  the owner of a row reads it from every rank in rank order, and writes it to every rank
//   ONE_SHOT  every rank reads every row from every rank in rank order, and writes it for itself: few rows
enum class Sum { MULTIMEM, TWO_SHOT, ONE_SHOT };

enum Flag : unsigned {
  RESIDUAL = 1,    // add the residual that came in
  LISTED = 2,      // row i's residual is row residual_rows[i] of the residual that came in
  BIAS = 4,
  POST_NORM = 8,
  NORM = 16,
  KEEP = 32,       // write the residual
};

// Everything that is fixed at compile time.
template <class Element_, int HIDDEN_, int WORLD_, Sum SUM_, unsigned FLAGS_, int THREADS_PER_ROW_, int ROWS_PER_BLOCK_,
          int AHEAD_>
struct Shape {
  using Element = Element_;
  static constexpr int HIDDEN = HIDDEN_, WORLD = WORLD_, FLAGS = FLAGS_;
  static constexpr int THREADS_PER_ROW = THREADS_PER_ROW_, ROWS_PER_BLOCK = ROWS_PER_BLOCK_, AHEAD = AHEAD_;
  static constexpr Sum SUM = SUM_;
  static_assert(HIDDEN % 8 == 0 && HIDDEN >= 64 && HIDDEN <= 16384, "hidden must be a multiple of 8 from 64 to 16384");
  static_assert(WORLD >= 1 && WORLD <= MAX_RANKS, "1 to 8 ranks");
  static_assert(THREADS_PER_ROW % 32 == 0, "whole warps");

  static constexpr int THREADS = THREADS_PER_ROW * ROWS_PER_BLOCK;
  static constexpr int ROW_BYTES = HIDDEN * Element::BYTES;
  static constexpr int ROW_VECTORS = ROW_BYTES / 16;
  static constexpr int VECTORS = (ROW_VECTORS + THREADS_PER_ROW - 1) / THREADS_PER_ROW;  // of a row, for each thread
  static constexpr int WARPS_PER_ROW = THREADS_PER_ROW / 32;

  static DEVICE constexpr bool has(Flag flag) { return FLAGS & flag; }

  static constexpr int SOURCES = SUM == Sum::MULTIMEM ? 1 : WORLD;  // the switch delivers one vector, peers one each
  static_assert(VECTORS % AHEAD == 0, "a vector's slot is known at compile time");

  // Shared memory, in vectors for each thread: what arrives from peers, the residual. Then two sets of warps' sums.
  static constexpr int PEER_SLOTS = SUM == Sum::MULTIMEM ? 0 : AHEAD * WORLD;
  static constexpr int RESIDUAL_SLOTS = !has(RESIDUAL) ? 0 : has(POST_NORM) ? VECTORS : AHEAD;
  static constexpr int SLOT_BYTES = 16 * THREADS * (PEER_SLOTS + RESIDUAL_SLOTS);
  static constexpr int SHARED_BYTES = SLOT_BYTES + 2 * 4 * ROWS_PER_BLOCK * WARPS_PER_ROW;
};

// What may differ from launch to launch; the same on all ranks but for what is this rank's own.
struct Launch {
  Place place;
  const char* partial[MAX_RANKS];  // [rows, hidden] of each rank
  char* hidden[MAX_RANKS];         // [rows, hidden] of each rank; no row of it lies in a partial
  const char* partial_multicast;
  char* hidden_multicast;
  const char* residual_in;  // [rows of this rank's shard, hidden]
  char* residual_out;       // the same; may be residual_in, unless LISTED
  u64 residual_stride;      // bytes from one virtual rank's residual to the next one's
  const int* residual_rows;
  const char* bias;  // [hidden], as post_weight and weight
  const char* post_weight;
  const char* weight;
  float post_eps, post_offset, eps, offset;  // a norm's gain is offset + weight
  int first_row[MAX_RANKS + 1];              // rank r owns rows first_row[r] up to first_row[r + 1]
  int row_vectors;                           // 16-byte vectors of a row
  int first_residual[MAX_RANKS];             // the first row of rank r's residual_in, in the numbers of residual_rows
};

// The rows of one group of threads, and this thread's vectors of each.
template <class S>
class Group {
 public:
  using Element = typename S::Element;
  static constexpr int WIDTH = Element::WIDTH;
  using Values = Wide<WIDTH>;

  DEVICE Group(const Launch& launch, int rank) : launch(launch), rank(rank) {
    group = ptx::thread() / S::THREADS_PER_ROW;
    thread = ptx::thread() % S::THREADS_PER_ROW;
    first = S::SUM == Sum::ONE_SHOT ? 0 : launch.first_row[rank];
    end = launch.first_row[S::SUM == Sum::ONE_SHOT ? S::WORLD : rank + 1];
    stride = S::ROWS_PER_BLOCK * ptx::blocks();
    row = first + group * ptx::blocks() + ptx::block();
  }

  // What no other rank writes can be fetched before the ranks have met.
  DEVICE void prefetch() {
    if (row >= end) return;
    each_vector([&](int i) {
      if (S::has(POST_NORM)) copy_residual(row, i);
      if (S::has(BIAS)) ptx::prefetch(launch.bias + offset_of(i));
      if (S::has(POST_NORM)) ptx::prefetch(launch.post_weight + offset_of(i));
      if (S::has(NORM)) ptx::prefetch(launch.weight + offset_of(i));
    });
    ptx::end_group_of_copies();
  }

  DEVICE void run() {
    if (row >= end) return;
#pragma unroll
    for (int i = 0; i < S::AHEAD; ++i) issue(row, i, true);
#pragma unroll 1
    for (; row < end; row += stride) {
      float squares = take_row();
      if (S::has(POST_NORM)) squares = post_norm(squares);
      finish(S::has(NORM) ? scale(squares, launch.eps) : 1.0f);
    }
  }

 private:
  // -- a row's steps ------------------------------------------------------------------------------------------------------

  // held = the sum over ranks and what can be added to it at once. Returns the sum of the squares.
  DEVICE float take_row() {
    float squares = 0;
    int next = row + stride;
#pragma unroll
    for (int i = 0; i < S::VECTORS; ++i) {
      ptx::wait_copies<S::AHEAD - 1>();
      if (mine(i)) {
        Values total = sum_of_sources(i);
        if (S::has(BIAS)) add(total, Element::widen(ptx::load_constant(launch.bias + offset_of(i))));
        if (!S::has(POST_NORM)) add_residual(total, i);
        held[i] = Element::round(total);
        squares += squared(total);
      }
      int ahead = i + S::AHEAD;
      if (ahead < S::VECTORS) issue(row, ahead, true);
      else issue(next, ahead - S::VECTORS, next < end);
    }
    return squares;
  }

  DEVICE float post_norm(float squares) {
    float factor = scale(squares, launch.post_eps);
    squares = 0;
    each_vector([&](int i) {
      Values total = scaled(i, factor, launch.post_weight, launch.post_offset);
      add_residual(total, i);
      held[i] = Element::round(total);
      squares += squared(total);
      if (row + stride < end) copy_residual(row + stride, i);
    });
    ptx::end_group_of_copies();
    return squares;
  }

  DEVICE void finish(float factor) {
    each_vector([&](int i) {
      if (S::has(KEEP)) ptx::store(residual_out(row) + offset_of(i), held[i]);
      broadcast(i, S::has(NORM) ? Element::round(scaled(i, factor, launch.weight, launch.offset)) : held[i]);
    });
  }

  // -- this rank and the others -----------------------------------------------------------------------------------------

  // Every vector's copies are a group, also when there are none: take_row counts groups.
  DEVICE void issue(int of_row, int i, bool wanted) {
    wanted = wanted && mine(i);
    u64 place = static_cast<u64>(of_row) * S::ROW_BYTES + offset_of(i);
    if constexpr (S::SUM == Sum::MULTIMEM) {
      Element::ld_reduce(flight[i % S::AHEAD], launch.partial_multicast + place, wanted);
    } else if (wanted) {
#pragma unroll
      for (int source = 0; source < S::SOURCES; ++source)
        ptx::copy_async(slot(i % S::AHEAD * S::SOURCES + source), launch.partial[source] + place);
    }
    if (!S::has(POST_NORM) && wanted) copy_residual(of_row, i);
    ptx::end_group_of_copies();
  }

  DEVICE Values sum_of_sources(int i) {
    if constexpr (S::SUM == Sum::MULTIMEM) return Element::widen(flight[i % S::AHEAD]);
    Values total{};
#pragma unroll
    for (int source = 0; source < S::SOURCES; ++source)
      add(total, Element::widen(*slot(i % S::AHEAD * S::SOURCES + source)));
    return total;
  }

  DEVICE void broadcast(int i, Vec out) {
    u64 place = static_cast<u64>(row) * S::ROW_BYTES + offset_of(i);
    if constexpr (S::SUM == Sum::MULTIMEM) {
      ptx::multimem_store(launch.hidden_multicast + place, out);
    } else if constexpr (S::SUM == Sum::ONE_SHOT) {
      ptx::store(launch.hidden[rank] + place, out);
    } else {
#pragma unroll
      for (int peer = 0; peer < S::WORLD; ++peer) ptx::store(launch.hidden[peer] + place, out);
    }
  }

  // -- the residual -------------------------------------------------------------------------------------------------------

  DEVICE void copy_residual(int of_row, int i) {
    if (!S::has(RESIDUAL)) return;
    int from = S::has(LISTED) ? launch.residual_rows[of_row] - launch.first_residual[rank] : of_row - first;
    const char* residual = launch.residual_in + ptx::virtual_rank() * launch.residual_stride;
    ptx::copy_async(residual_slot(i), residual + static_cast<u64>(from) * S::ROW_BYTES + offset_of(i));
  }

  DEVICE void add_residual(Values& total, int i) {
    if (S::has(RESIDUAL)) add(total, Element::widen(*residual_slot(i)));
  }

  DEVICE Vec* residual_slot(int i) { return slot(S::PEER_SLOTS + (S::has(POST_NORM) ? i : i % S::AHEAD)); }

  DEVICE char* residual_out(int of_row) {
    char* residual = launch.residual_out + ptx::virtual_rank() * launch.residual_stride;
    return residual + static_cast<u64>(of_row - first) * S::ROW_BYTES;
  }

  // A place in shared memory that this thread alone uses.
  DEVICE Vec* slot(int number) { return static_cast<Vec*>(ptx::shared()) + number * S::THREADS + ptx::thread(); }

  // -- arithmetic ---------------------------------------------------------------------------------------------------------

  static DEVICE void add(Values& total, Values more) {
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) total.value[k] += more.value[k];
  }

  static DEVICE float squared(Values values) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) sum += values.value[k] * values.value[k];
    return sum;
  }

  DEVICE Values scaled(int i, float factor, const char* weight, float offset) {
    ptx::forget(held[i]);
    Values values = Element::widen(held[i]), gain = Element::widen(ptx::load_constant(weight + offset_of(i)));
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) values.value[k] = values.value[k] * factor * (offset + gain.value[k]);
    return values;
  }

  // 1 / sqrt(mean of squares + eps), in every thread of the group.
  DEVICE float scale(float squares, float eps) {
    return ptx::reciprocal_sqrt(sum_of_group(squares) * (1.0f / S::HIDDEN) + eps);
  }

  // Two sets of sums take turns, so that one barrier is enough: who writes a set again has met all who read it.
  DEVICE float sum_of_group(float value) {
    value = ptx::sum_of_warp(value);
    if (S::WARPS_PER_ROW == 1) return value;
    float* sums = reinterpret_cast<float*>(static_cast<char*>(ptx::shared()) + S::SLOT_BYTES);
    sums += (set * S::ROWS_PER_BLOCK + group) * S::WARPS_PER_ROW;
    set ^= 1;
    if (thread % 32 == 0) sums[thread / 32] = value;
    ptx::sync_some(1 + group, S::THREADS_PER_ROW);
    value = 0;
#pragma unroll
    for (int warp = 0; warp < S::WARPS_PER_ROW; ++warp) value += sums[warp];
    return value;
  }

  // -- this thread's vectors of a row ---------------------------------------------------------------------------------------

  DEVICE u64 offset_of(int i) { return 16u * thread + u64{16} * i * S::THREADS_PER_ROW; }

  // Asked at run time even where it is always so: branches keep the compiler from issuing loads earlier than written,
  // for which it has no registers.
  DEVICE bool mine(int i) { return i * S::THREADS_PER_ROW + thread < launch.row_vectors; }

  template <class Act>
  DEVICE void each_vector(Act act) {
#pragma unroll
    for (int i = 0; i < S::VECTORS; ++i)
      if (mine(i)) act(i);
  }

  const Launch& launch;
  int rank, group, thread;
  int first, end, stride, row;
  int set = 0;
  Vec flight[S::SUM == Sum::MULTIMEM ? S::AHEAD : 1] = {};  // indexed by constants alone, as held is: registers
  Vec held[S::VECTORS];
};

template <class S>
DEVICE void fused_allreduce_rmsnorm(const Launch& launch) {
  int rank = launch.place.rank + ptx::virtual_rank();
  u32 tag = static_cast<u32>(launch.first_row[S::WORLD]) << 12 | ptx::blocks();
  Meeting<S::WORLD> meeting(launch.place, rank, tag);
  Group<S> group(launch, rank);
  group.prefetch();
  if (!meeting.enter()) return;
  if (S::SUM == Sum::MULTIMEM) ptx::fence_alias();
  group.run();
  if (S::SUM == Sum::MULTIMEM) ptx::fence_alias();
  meeting.leave();
}

}  // namespace tokenweave
