// What kernel.cuh does in two shots, written the plain way, to be measured against: a block has one row in flight, stops
// as a whole twice a row, writes the residual and reads it back. Appended to `#include "kernel.cuh"` by naive.py.
namespace tokenweave {

template <int WIDTH>
DEVICE void add_widened(Wide<WIDTH>& total, Wide<WIDTH> more) {
#pragma unroll
  for (int k = 0; k < WIDTH; ++k) total.value[k] += more.value[k];
}

DEVICE Vec& vector_at(const char* row, int vector) {
  return reinterpret_cast<Vec*>(const_cast<char*>(row))[vector];
}

template <class S>
DEVICE float naive_sum_of_block(float value) {
  float* sums = static_cast<float*>(ptx::shared());
  value = ptx::sum_of_warp(value);
  ptx::sync_block();  // all have read what the row before left in `sums`
  if (ptx::thread() % 32 == 0) sums[ptx::thread() / 32] = value;
  ptx::sync_block();
  value = 0;
  for (int warp = 0; warp < S::THREADS / 32; ++warp) value += sums[warp];
  return value;
}

template <class S>
DEVICE float naive_sum_of_ranks(const Launch& launch, u64 place, const char* residual_in, const char* residual_out) {
  using Element = typename S::Element;
  float squares = 0;
  for (int i = ptx::thread(); i < launch.row_vectors; i += S::THREADS) {
    Wide<Element::WIDTH> total{};
#pragma unroll
    for (int peer = 0; peer < S::WORLD; ++peer)
      add_widened(total, Element::widen(vector_at(launch.partial[peer] + place, i)));
    if (S::has(RESIDUAL)) add_widened(total, Element::widen(vector_at(residual_in, i)));
    vector_at(residual_out, i) = Element::round(total);
#pragma unroll
    for (int k = 0; k < Element::WIDTH; ++k) squares += total.value[k] * total.value[k];
  }
  return squares;
}

template <class S>
DEVICE void naive_row(const Launch& launch, int rank, int row) {
  using Element = typename S::Element;
  u64 place = static_cast<u64>(row) * S::ROW_BYTES;
  u64 shard = static_cast<u64>(row - launch.first_row[rank]) * S::ROW_BYTES + ptx::virtual_rank() * launch.residual_stride;
  const char* kept = launch.residual_out + shard;
  float squares = naive_sum_of_ranks<S>(launch, place, launch.residual_in + shard, kept);
  float factor = ptx::reciprocal_sqrt(naive_sum_of_block<S>(squares) / S::HIDDEN + launch.eps);
  for (int i = ptx::thread(); i < launch.row_vectors; i += S::THREADS) {
    Wide<Element::WIDTH> values = Element::widen(vector_at(kept, i)), gain = Element::widen(vector_at(launch.weight, i));
#pragma unroll
    for (int k = 0; k < Element::WIDTH; ++k) values.value[k] = values.value[k] * factor * (launch.offset + gain.value[k]);
    Vec out = Element::round(values);
#pragma unroll
    for (int peer = 0; peer < S::WORLD; ++peer) vector_at(launch.hidden[peer] + place, i) = out;
  }
}

template <class S>
DEVICE void naive_allreduce_rmsnorm(const Launch& launch) {
  static_assert(S::SUM == Sum::TWO_SHOT && S::ROWS_PER_BLOCK == 1 && S::FLAGS == (RESIDUAL | NORM | KEEP), "this one only");
  int rank = launch.place.rank + ptx::virtual_rank();
  u32 tag = static_cast<u32>(launch.first_row[S::WORLD]) << 12 | ptx::blocks();
  Meeting<S::WORLD> meeting(launch.place, rank, tag);
  if (!meeting.enter()) return;
  for (int row = launch.first_row[rank] + ptx::block(); row < launch.first_row[rank + 1]; row += ptx::blocks())
    naive_row<S>(launch, rank, row);
  meeting.leave();
}

}  // namespace tokenweave
