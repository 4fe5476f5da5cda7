// The meeting of all ranks, block by block: epochs in signal pads, bounded waits, a sticky abort.
#pragma once

#include "ptx.cuh"

namespace tokenweave {

constexpr int MAX_RANKS = 8;
constexpr int MAX_BLOCKS = 256;
constexpr u32 LOOKS_PER_ASK = 1024;  // looks at a signal, in this GPU's memory, for one at the host's word, over PCIe

// A channel's signals on one rank. `signal[b][r]` is written by block b of rank r alone: epoch << 32 | tag.
struct Pad {
  u64 signal[MAX_BLOCKS][MAX_RANKS];
  u64 epoch[MAX_BLOCKS];  // the last epoch that this rank's own block b has met in
};

// A rank's abort words, shared by its channels.
struct Abort {
  u64 raised;   // by each rank that gives up, on all of them: reason << 32 | that rank << 16 | the rank it waited for
  u64 claimed;  // by the thread of this rank that writes the report
};

enum Reason : u32 { NOTHING = 0, TIMEOUT = 1, MISMATCH = 2, ABORTED = 3, ASKED = 4 };

// In host memory that the device can use: what Python raises, `reason` last; and `asked`, by which the host has all that
// waits give up. A store of the host's, so that it needs no driver, no stream and no place in a captured graph.
struct Report {
  u64 rank, peer, channel, block, expected, seen, told_by;
  u64 reason;
  u64 asked;
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
    for (u32 looks = 1;; ++looks) {
      u64 seen = ptx::load_acquire(slot);
      bool arrived = static_cast<int>(static_cast<u32>(seen >> 32) - expected) >= 0;
      if (arrived && compare && static_cast<u32>(seen) != tag) return give_up(MISMATCH, peer, expected, seen);
      if (arrived) return true;
      if (aborted()) return false;
      if (looks % LOOKS_PER_ASK == 0 && asked()) return give_up(ASKED, peer, expected, seen);
      i64 waited_ns = ptx::now_ns() - start_ns;  // may be negative: the clock is set now and then
      if (waited_ns > static_cast<i64>(place.timeout_ns)) return give_up(TIMEOUT, peer, expected, seen);
      ptx::pause();
    }
  }

  // Has any rank given up? If it is this one, its report is there already.
  DEVICE bool aborted() {
    u64 raised = ptx::load_acquire(&place.abort[rank]->raised);
    if (raised) report(ABORTED, raised & 0xffff, 0, raised, raised >> 16 & 0xffff);
    return raised;
  }

  DEVICE bool asked() { return ptx::load_acquire(&place.report[ptx::virtual_rank()].asked); }

  // Of a rank the first thread that gives up, or hears of it, reports; so who tells others has said why.
  DEVICE bool give_up(Reason reason, int peer, u32 expected, u64 seen) {
    if (!report(reason, peer, static_cast<u64>(expected) << 32 | tag, seen, rank)) return false;
    u64 raised = static_cast<u64>(reason) << 32 | rank << 16 | peer;
#pragma unroll 1
    for (int r = 0; r < WORLD; ++r) ptx::store_release(&place.abort[r]->raised, raised);
    return false;
  }

  DEVICE bool report(Reason reason, u64 peer, u64 expected, u64 seen, int told_by) {
    if (!ptx::claim(&place.abort[rank]->claimed)) return false;
    Report* report = place.report + ptx::virtual_rank();
    report->rank = rank;
    report->peer = peer;
    report->channel = place.channel;
    report->block = ptx::block();
    report->expected = expected;
    report->seen = seen;
    report->told_by = told_by;
    ptx::store_release(&report->reason, reason);
    return true;
  }

  const Place& place;
  int rank;
  u32 tag;
  u32 epoch;
};

}  // namespace tokenweave
