// The meeting of all ranks, block by block: epochs in signal pads, bounded waits, a sticky abort.
#pragma once

#include "ptx.cuh"

namespace tokenweave {

constexpr int MAX_RANKS = 8;
constexpr int MAX_BLOCKS = 256;

// A channel's signals on one rank. `signal[b][r]` is written by block b of rank r alone: epoch << 32 | tag.
struct Pad {
  u64 signal[MAX_BLOCKS][MAX_RANKS];
  u64 epoch[MAX_BLOCKS];  // the last epoch that this rank's own block b has met in
};

// A rank's abort words, shared by its channels. `raised[r]` is written by rank r alone: 1 << 32 | the rank it gave up on.
struct Abort {
  u64 raised[MAX_RANKS];
  u64 claimed;  // by the thread of this rank that writes the report
};

enum Reason : u32 { NOTHING = 0, TIMEOUT = 1, MISMATCH = 2, ABORTED = 3 };

// In host memory that the device can write: what Python raises. `reason` is written last.
struct Report {
  u64 rank, peer, channel, block, expected, seen, told_by;
  u64 reason;
};

// What a meeting needs to know of a launch.
struct Place {
  Pad* pad[MAX_RANKS];
  Abort* abort[MAX_RANKS];
  Report* report;  // one for each virtual rank
  u64 timeout_ns;
  int rank;
  int channel;
};

// Every rank's block b meets every other rank's block b, so all ranks must launch the same number of blocks; the tag,
// which holds it and the row count, is compared on arrival.
template <int WORLD>
class Meeting {
 public:
  DEVICE Meeting(const Place& place, int rank, u32 tag) : place(place), rank(rank), tag(tag) {
    epoch = static_cast<u32>(place.pad[rank]->epoch[ptx::block()]);
  }

  // True once every rank's block has arrived: what it wrote before is visible here. False: give up at once.
  DEVICE bool enter() { return ptx::all_of_block(ptx::thread() >= WORLD || (!aborted() && meet(epoch + 1, true))); }

  // The same after the block's last access to a peer's memory.
  DEVICE bool leave() {
    ptx::sync_block();
    bool met = ptx::all_of_block(ptx::thread() >= WORLD || meet(epoch + 2, false));
    if (met && ptx::thread() == 0) place.pad[rank]->epoch[ptx::block()] = epoch + 2;
    return met;
  }

 private:
  // Thread t signals rank t and waits for rank t.
  DEVICE bool meet(u32 expected, bool compare) {
    int peer = ptx::thread();
    ptx::store_release(&place.pad[peer]->signal[ptx::block()][rank], static_cast<u64>(expected) << 32 | tag);
    const u64* slot = &place.pad[rank]->signal[ptx::block()][peer];
    u64 start_ns = ptx::now_ns();
    for (;;) {
      u64 seen = ptx::load_acquire(slot);
      bool arrived = static_cast<int>(static_cast<u32>(seen >> 32) - expected) >= 0;
      if (arrived && compare && static_cast<u32>(seen) != tag) return give_up(MISMATCH, peer, expected, seen);
      if (arrived) return true;
      if (aborted()) return false;
      i64 waited_ns = ptx::now_ns() - start_ns;  // may be negative: the clock is set now and then
      if (waited_ns > static_cast<i64>(place.timeout_ns)) return give_up(TIMEOUT, peer, expected, seen);
      ptx::pause();
    }
  }

  // Did this rank give up, or the one that this thread waits for? If the latter, this rank's other threads hear of it.
  DEVICE bool aborted() {
    Abort* here = place.abort[rank];
    if (ptx::load_acquire(&here->raised[rank])) return true;
    u64 raised = ptx::load_acquire(&here->raised[ptx::thread()]);
    if (!raised) return false;
    report(ABORTED, static_cast<u32>(raised), 0, 0, ptx::thread());
    ptx::store_release(&here->raised[rank], raised);
    return true;
  }

  DEVICE bool give_up(Reason reason, int peer, u32 expected, u64 seen) {
    report(reason, peer, static_cast<u64>(expected) << 32 | tag, seen, rank);
#pragma unroll 1
    for (int r = 0; r < WORLD; ++r) ptx::store_release(&place.abort[r]->raised[rank], 1ull << 32 | peer);
    return false;
  }

  DEVICE void report(Reason reason, u64 peer, u64 expected, u64 seen, int told_by) {
    if (!ptx::claim(&place.abort[rank]->claimed)) return;
    Report* report = place.report + ptx::virtual_rank();
    report->rank = rank;
    report->peer = peer;
    report->channel = place.channel;
    report->block = ptx::block();
    report->expected = expected;
    report->seen = seen;
    report->told_by = told_by;
    ptx::store_release(&report->reason, reason);
  }

  const Place& place;
  int rank;
  u32 tag;
  u32 epoch;
};

}  // namespace tokenweave
