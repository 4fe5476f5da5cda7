// Runs the fused kernel as threads, with every rank in one process: tests/kernels/twin.py compiles and calls it.
//
//   twin SCENARIO RESULTS
//
// SCENARIO: int32 words, see `read`, then the tensors. RESULTS: for each channel, launch and rank that came back, the
// hidden rows that this rank saw after the launch and its residual shard; then every rank's report.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#include "kernel.cuh"

using namespace tokenweave;
using Fused = Shape<TOKENWEAVE_SHAPE>;

constexpr int WORLD = Fused::WORLD, ROW = Fused::ROW_BYTES;

struct Scenario {
  int rows, residual_rows, channels, launches, dead_rank, dead_from, timeout_ms, absent_ms, asked_rank, asked_ms;
  float eps, offset, post_eps, post_offset;
  std::vector<int> blocks;          // [launches, ranks]
  std::vector<int> claimed_rows;    // [WORLD]: what each rank takes for the row count
  std::vector<int> first_row;       // [WORLD + 1]
  std::vector<int> first_residual;  // [WORLD]
  std::vector<int> listed;          // [rows]: row numbers of the residual
  std::vector<char> weight, post_weight, bias;
  std::vector<char> partials;   // [channels, launches, ranks, rows, hidden]
  std::vector<char> residuals;  // [channels, residual_rows, hidden]
};

template <class T>
std::vector<T> read(std::FILE* file, std::size_t count) {
  std::vector<T> values(count + 16);  // never empty, so that data() is a place
  if (std::fread(values.data(), sizeof(T), count, file) != count) std::abort();
  return values;
}

Scenario read(const char* path) {
  std::FILE* file = std::fopen(path, "rb");
  Scenario s;
  auto head = read<int>(file, 10);
  s.rows = head[0], s.residual_rows = head[1], s.channels = head[2], s.launches = head[3];
  s.dead_rank = head[4], s.dead_from = head[5], s.timeout_ms = head[6], s.absent_ms = head[7];
  s.asked_rank = head[8], s.asked_ms = head[9];
  auto norms = read<float>(file, 4);
  s.eps = norms[0], s.offset = norms[1], s.post_eps = norms[2], s.post_offset = norms[3];
  s.blocks = read<int>(file, s.launches * WORLD);
  s.claimed_rows = read<int>(file, WORLD);
  s.first_row = read<int>(file, WORLD + 1);
  s.first_residual = read<int>(file, WORLD);
  s.listed = read<int>(file, s.rows);
  s.weight = read<char>(file, ROW);
  s.post_weight = read<char>(file, ROW);
  s.bias = read<char>(file, ROW);
  s.partials = read<char>(file, std::size_t(s.channels) * s.launches * WORLD * s.rows * ROW);
  s.residuals = read<char>(file, std::size_t(s.channels) * s.residual_rows * ROW);
  std::fclose(file);
  return s;
}

// Memory of exactly `bytes` bytes, aligned as CUDA aligns it: a sanitizer sees the first byte beyond.
struct Region {
  explicit Region(std::size_t bytes) : at(static_cast<char*>(std::aligned_alloc(16, bytes / 16 * 16 + 16 * (bytes == 0)))) {
    std::memset(at, 0, bytes);
  }
  ~Region() { std::free(at); }
  char* at;
};

struct Rank {
  Rank() { std::memset(&abort, 0, sizeof abort), std::memset(&report, 0, sizeof report); }
  Abort abort;
  Report report;
};

// One half of the model on all ranks.
struct Channel {
  explicit Channel(const Scenario& s) {
    for (int rank = 0; rank < WORLD; ++rank) {
      std::size_t bytes = std::size_t(s.rows) * ROW;
      partials.push_back(std::make_unique<Region>(ADJACENT ? 2 * bytes : bytes));
      hiddens.push_back(std::make_unique<Region>(ADJACENT ? 0 : bytes));
      pads.push_back(std::make_unique<Pad>());
      std::memset(pads.back().get(), 0, sizeof(Pad));
    }
  }
  char* partial(int rank) { return partials[rank]->at; }
  char* hidden(const Scenario& s, int rank) {
    return ADJACENT ? partial(rank) + std::size_t(s.rows) * ROW : hiddens[rank]->at;
  }
  static constexpr bool ADJACENT = Fused::SUM == Sum::MULTIMEM;  // in the one multicast mapping
  std::vector<std::unique_ptr<Region>> partials, hiddens;
  std::vector<std::unique_ptr<Pad>> pads;
};

struct Result {
  std::vector<char> hidden, residual;
};

Launch launch_of(const Scenario& s, Channel& channel, std::vector<std::unique_ptr<Rank>>& ranks, int rank, int number) {
  Launch launch;
  std::memset(&launch, 0, sizeof launch);
  for (int r = 0; r < WORLD; ++r) {
    launch.place.pad[r] = channel.pads[r].get();
    launch.place.abort[r] = &ranks[r]->abort;
    launch.partial[r] = channel.partial(r);
    launch.hidden[r] = channel.hidden(s, r);
    launch.first_residual[r] = s.first_residual[r];
  }
  for (int r = 0; r <= WORLD; ++r) launch.first_row[r] = s.first_row[r];
  launch.first_row[WORLD] += s.claimed_rows[rank] - s.rows;
  launch.place.report = &ranks[rank]->report;
  launch.place.timeout_ns = u64(s.timeout_ms) * 1000000;
  launch.place.rank = rank;
  launch.place.channel = number;
  launch.row_vectors = Fused::ROW_VECTORS;
  launch.partial_multicast = host::multicast.base;
  launch.hidden_multicast = const_cast<char*>(host::multicast.base) + std::size_t(s.rows) * ROW;
  launch.residual_rows = s.listed.data();
  launch.bias = s.bias.data(), launch.post_weight = s.post_weight.data(), launch.weight = s.weight.data();
  launch.eps = s.eps, launch.offset = s.offset, launch.post_eps = s.post_eps, launch.post_offset = s.post_offset;
  return launch;
}

// What one rank does on one lane: write a partial, launch, use the hidden rows, and let go of the partial. A rank that
// has given up goes on, as a queue of launches does.
void play(const Scenario& s, Channel& channel, std::vector<std::unique_ptr<Rank>>& ranks, int rank, int number,
          std::vector<Result>& results) {
  bool all = Fused::SUM == Sum::ONE_SHOT;
  int first = all ? 0 : s.first_row[rank], kept = (all ? s.rows : s.first_row[rank + 1]) - first;
  int held_from = Fused::has(LISTED) ? (all ? 0 : s.first_residual[rank]) : first;
  int held_to = !Fused::has(LISTED) ? first + kept : all || rank + 1 == WORLD ? s.residual_rows : s.first_residual[rank + 1];
  Launch launch = launch_of(s, channel, ranks, rank, number);
  Region in(std::size_t(held_to - held_from) * ROW), out(std::size_t(kept) * ROW);
  if (Fused::has(RESIDUAL))
    std::memcpy(in.at, s.residuals.data() + (std::size_t(number) * s.residual_rows + held_from) * ROW,
                std::size_t(held_to - held_from) * ROW);
  launch.residual_in = in.at;
  launch.residual_out = Fused::has(LISTED) ? out.at : in.at;
  std::size_t bytes = std::size_t(s.rows) * ROW;
  for (int i = 0; i < s.launches; ++i) {
    if (rank == s.dead_rank && i >= s.dead_from) return;
    if (rank == s.dead_rank) std::this_thread::sleep_for(std::chrono::milliseconds(s.absent_ms));
    const char* partial = s.partials.data() + ((std::size_t(number) * s.launches + i) * WORLD + rank) * bytes;
    std::memcpy(channel.partial(rank), partial, bytes);
    int blocks = s.blocks[i * WORLD + rank];
    host::launch(blocks, Fused::THREADS, Fused::SHARED_BYTES, 0, [&] { fused_allreduce_rmsnorm<Fused>(launch); });
    Result result;
    result.hidden.assign(channel.hidden(s, rank), channel.hidden(s, rank) + bytes);
    result.residual.assign(launch.residual_out, launch.residual_out + std::size_t(kept) * ROW);
    std::memset(channel.partial(rank), 0xff, bytes);  // as the next layer's GEMM will: nobody may still read it
    results.push_back(std::move(result));
  }
}

int run(const Scenario& s, const char* path) {
  std::vector<std::unique_ptr<Channel>> channels;
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int r = 0; r < WORLD; ++r) ranks.push_back(std::make_unique<Rank>());
  for (int c = 0; c < s.channels; ++c) channels.push_back(std::make_unique<Channel>(s));
  if (Fused::SUM == Sum::MULTIMEM) {
    host::multicast.size = 2 * u64(s.rows) * ROW;
    host::multicast.base = static_cast<char*>(mmap(nullptr, host::multicast.size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for (int r = 0; r < WORLD; ++r) host::multicast.ranks.push_back(channels[0]->partial(r));
  }
  std::vector<std::vector<Result>> results(s.channels * WORLD);
  std::vector<std::thread> players;
  for (int c = 0; c < s.channels; ++c)
    for (int r = 0; r < WORLD; ++r)
      players.emplace_back([&, c, r] { play(s, *channels[c], ranks, r, c, results[c * WORLD + r]); });
  if (s.asked_rank >= 0) {  // as the host of that rank does, while its kernels wait
    std::this_thread::sleep_for(std::chrono::milliseconds(s.asked_ms));
    __atomic_store_n(&ranks[s.asked_rank]->report.asked, 1, __ATOMIC_RELEASE);
  }
  for (auto& player : players) player.join();

  std::FILE* file = std::fopen(path, "wb");
  for (auto& each : results) {
    int count = each.size();
    std::fwrite(&count, sizeof count, 1, file);
    for (auto& result : each) {
      std::fwrite(result.hidden.data(), 1, result.hidden.size(), file);
      std::fwrite(result.residual.data(), 1, result.residual.size(), file);
    }
  }
  for (auto& rank : ranks) std::fwrite(&rank->report, sizeof(Report), 1, file);
  std::fclose(file);
  return 0;
}

int main(int, char** arguments) { return run(read(arguments[1]), arguments[2]); }

// For a process that plays one rank: the launch of a shared library.
extern "C" void tokenweave_launch(const Launch* launch, int blocks) {
  host::launch(blocks, Fused::THREADS, Fused::SHARED_BYTES, 0, [=] { fused_allreduce_rmsnorm<Fused>(*launch); });
}

extern "C" void tokenweave_multicast(const char* base, u64 size, char* const* ranks) {
  host::multicast = {base, size, {ranks, ranks + WORLD}};
}
