// What several threads may do at once, to be run under the thread sanitizer: two step optimizers of their own, one adds
// squares and norms, one selects. Each call is also cut over threads: those of the standard library, since there is no
// OpenMP runtime here, whose own synchronisation the sanitizer would not see. Exit status 0 if every result is that of
// one thread alone.
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <thread>
#include <vector>

#include "cpu/driver.h"
#include "cpu/parallel.h"
#include "cpu/select.h"
#include "test_helpers.h"

constexpr int kRounds = 3;
constexpr int kThreads = 3;
const std::vector<int64_t> kSizes = {300000, 1, 0, 70000, 129};  // the first alone is worth threads

// The parameters of an optimizer: masked, strided and compact ones.
struct Optimizer {
  std::vector<Arrays<float>> arrays;
  ChildMask mask{kSizes[3], 30};

  Optimizer() {
    for (size_t i = 0; i < kSizes.size(); ++i) arrays.emplace_back(kSizes[i], i % 2 ? 1 : 2);
    arrays[3].keep_child(mask.count());
  }

  std::vector<StepItem> items() {
    std::vector<StepItem> all;
    for (size_t i = 0; i < arrays.size(); ++i) all.push_back(arrays[i].item(i != 3, i % 2 == 0, {}));
    all[3].child = mask.packed();
    return all;
  }

  void run(int threads) {
    for (int round = 0; round < kRounds; ++round) step_cpu(items(), threads);
  }
};

// What is computed from arrays that all threads may read, into arrays of one thread.
struct Reader {
  std::vector<float> score;
  std::vector<uint8_t> bits;
  std::vector<double> sums;
  bool finite = true;
  int64_t nan = -1;

  void squares(SquaresItem shared, const std::vector<StepItem>& normed, int threads) {
    score.assign(static_cast<size_t>(shared.numel), 0.5f);
    shared.score = score.data();
    for (int round = 0; round < kRounds; ++round)
      finite = accumulate_squares_cpu(shared, 0.25, -3.0, threads) && finite;
    sums = sums_of_squares_cpu(normed, threads);
  }

  // Of many slices, so that workers share them; the last score of them is a NaN in the second selection.
  void select(const std::vector<float>& scores, const std::vector<float>& damaged, int threads) {
    const auto numel = static_cast<int64_t>(scores.size());
    bits.assign(mask_bytes(numel), 0);
    select_cpu({{scores.data(), bits.data(), numel}}, numel / 3, true, threads);
    std::vector<uint8_t> none(bits.size());
    nan = select_cpu({{damaged.data(), none.data(), numel}}, numel / 3, false, threads);
  }
};

static bool same(const Optimizer& a, const Optimizer& b) {
  for (size_t i = 0; i < a.arrays.size(); ++i) {
    if (!same_bytes(a.arrays[i].param, b.arrays[i].param)) return false;
    for (int k = 0; k < 3; ++k)
      if (!same_bytes(a.arrays[i].state[k], b.arrays[i].state[k])) return false;
  }
  return true;
}

int main() {
  std::vector<float> scores;
  for (uint32_t i = 0; i < 128 * 1024 * 6; ++i) scores.push_back(noise(i, 9));
  std::vector<float> damaged = scores;
  damaged.back() = std::numeric_limits<float>::quiet_NaN();

  Optimizer shared, alone;
  Reader squares_alone, select_alone;
  const SquaresItem squared = shared.arrays[0].squares_item(nullptr);
  const std::vector<StepItem> normed = shared.items();
  alone.run(1);
  squares_alone.squares(squared, normed, 1);
  select_alone.select(scores, damaged, 1);

  Optimizer first, second;
  Reader squares[2], selects[2];
  std::vector<std::function<void()>> works = {[&] { first.run(kThreads); }, [&] { second.run(kThreads); }};
  for (int i = 0; i < 2; ++i) {
    works.push_back([&, i] { squares[i].squares(squared, normed, kThreads); });
    works.push_back([&, i] { selects[i].select(scores, damaged, kThreads); });
  }
  std::vector<std::thread> threads;
  for (const auto& work : works) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();

  expect(std::strcmp(parallel_runtime(), "std::thread") == 0, "there is no OpenMP runtime here");
  expect(same(first, alone) && same(second, alone), "steps beside each other equal one alone");
  for (int i = 0; i < 2; ++i) {
    expect(squares[i].finite && same_bytes(squares[i].score, squares_alone.score), "scores beside other threads", i);
    expect(same_bytes(squares[i].sums, squares_alone.sums), "norms beside other threads", i);
    expect(same_bytes(selects[i].bits, select_alone.bits), "selection beside other threads", i);
    expect(selects[i].nan == 0, "a NaN is noticed beside other threads", i);
  }
  std::printf(failures == 0 ? "threads: all passed\n" : "threads: %d failed\n", failures);
  return failures == 0 ? 0 : 1;
}
