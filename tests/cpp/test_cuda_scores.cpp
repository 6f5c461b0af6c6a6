// Unit tests of cuda/squares_kernel.h and cuda/select_kernel.h: in loops on the CPU they give the scores of the CPU's
// kernels, bit for bit, and select the same weights. Called by test_core.cpp.
#include <limits>

#include "cpu/select.h"
#include "cuda/score_plan.h"
#include "emulated_gpu.h"
#include "test_helpers.h"

namespace {

template <class P>
void test_add_squares(int64_t n, int64_t shift, double clip, bool broken) {
  Arrays<P> arrays(n + shift, 1);
  if (broken) store(arrays.grad[static_cast<size_t>(n + shift - 1)], typename Arrays<P>::T(NAN));
  std::vector<float> scores[2];
  for (auto& s : scores) {
    for (int64_t i = 0; i < n + shift; ++i) s.push_back(std::fabs(noise(static_cast<uint32_t>(i), 5)));
  }
  const SquaresItem item{arrays.grad.data() + shift, scores[0].data() + shift, n, nullptr, dtype_of(P{})};
  StepItem normed{};
  normed.numel = n;
  normed.dtype = item.dtype;
  normed.data[kGrad] = arrays.grad.data() + shift;
  double factor = -0.3;
  if (clip > 0) factor *= clip_factor(clip, sums_of_squares_cpu({normed}, 1)[0], factor);
  const bool expected_finite = accumulate_squares_cpu(item, 0.7, factor, 1);

  SquaresArgument argument{};
  argument.grad = item.grad;
  argument.score = scores[1].data() + shift;
  argument.numel = n;
  argument.dtype = item.dtype;
  argument.weight = 0.7;
  argument.grad_factor = -0.3;
  argument.vectors = shift == 0;
  uint8_t finite = 1;
  argument.finite = &finite;
  NormTable norm{};
  std::vector<double> sums(static_cast<size_t>(1 + norm_chunks_of(n)));
  if (clip > 0) {
    norm.count = 1;
    norm.chunks = norm_chunks_of(n);
    norm.items[0] = {item.grad, nullptr, n, 0, item.dtype};
    norm.tensor_sums = sums.data();
    norm.chunk_sums = sums.data() + 1;
    emulate_norm_chunks(norm, norm_blocks(norm));
    emulate_norm_tensors(norm, 1);
    argument.squares = sums.data();
    argument.grad_clip = clip;
  }
  emulate_add_squares(argument, squares_blocks(argument));
  if (!(broken && clip > 0)) expect(same_bytes(scores[1], scores[0]), "squares on a GPU equal the CPU's", n);
  expect((finite != 0) == expected_finite && expected_finite == !broken, "what is not finite is noticed", n);
}

template <class P>
void test_squares() {
  for (int64_t n : {1, 3, 4, 129, 8191, 8192, 8193, 30001}) {
    for (int64_t shift : {0, 1}) {
      for (double clip : {0.0, 1e-2, 1e9}) {
        for (bool broken : {false, true}) test_add_squares<P>(n, shift, clip, broken);
      }
    }
  }
}

// Scores in tensors of many sizes, some of which are on another device.
struct Scores {
  std::vector<std::vector<float>> values;
  std::vector<std::vector<uint8_t>> bits[2];  // those that the CPU writes, and those that the GPUs write
  int64_t total = 0;

  // `kind`: 0 smooth, 1 few values, 2 all equal, 3 both zeros and infinities
  explicit Scores(int kind) {
    for (int64_t n : {1000, 0, 1, 70000, 1024, 32768, 32769, 5}) add(n, kind);
    for (int64_t n = 0; n < 400; ++n) add(n % 200, kind);
  }

  void add(int64_t n, int kind) {
    std::vector<float> of_one;
    for (int64_t i = 0; i < n; ++i, ++total) {
      const float x = noise(static_cast<uint32_t>(total), 9);
      const float inf = std::numeric_limits<float>::infinity();
      of_one.push_back(kind == 0   ? x * x * 1e-9f
                       : kind == 1 ? std::round(x * 20) / 8
                       : kind == 2 ? 0.25f
                       : x < -0.6f ? -inf
                       : x > 0.6f  ? inf
                       : x > 0     ? 0.0f
                                   : -0.0f);
    }
    values.push_back(of_one);
    for (auto& side : bits) side.emplace_back(mask_bytes(n), uint8_t{0xA5});
  }

  std::vector<ScoredTensor> tensors(int side) {
    std::vector<ScoredTensor> result;
    for (size_t t = 0; t < values.size(); ++t) {
      result.push_back({values[t].data(), bits[side][t].data(), static_cast<int64_t>(values[t].size())});
    }
    return result;
  }
};

// The tensors of one device, and what its kernels need.
struct Part {
  std::vector<ScoredTensor> tensors;
  std::vector<int32_t> ties;
  std::vector<ScoreTable> tables;
};

// Runs the passes as childtune_fast/ops/select.py does. Returns whether no score is NaN.
bool select(std::vector<Part>* parts, const std::vector<size_t>& device_of, int64_t k, bool largest) {
  int64_t left = k;
  uint32_t wanted = 0;
  uint8_t nan = 0;
  const int ends[] = {32, 21, 10, 0};
  for (int digit = 0; digit < 3; ++digit) {
    std::vector<int64_t> counts(kDigits);
    for (Part& part : *parts) {
      for (ScoreTable& table : part.tables) {
        table.counts = counts.data();
        table.nan = &nan;
        table.flip = largest ? 0u : ~0u;
        table.wanted = wanted;
        table.wanted_shift = ends[digit];
        table.shift = ends[digit + 1];
        emulate_count_digits(table, score_blocks(table));
      }
    }
    if (nan != 0) return false;
    int value = (1 << (ends[digit] - ends[digit + 1])) - 1;
    for (; value > 0 && counts[value] < left; --value) left -= counts[value];
    wanted = wanted << (ends[digit] - ends[digit + 1]) | static_cast<uint32_t>(value);
  }
  for (Part& part : *parts) {
    for (ScoreTable& table : part.tables) {
      table.wanted = wanted;
      emulate_write_above(table, score_blocks(table));
    }
  }
  std::vector<size_t> at(parts->size());  // the ties' order is that of the tensors, wherever they are
  std::vector<size_t> next(parts->size());
  for (size_t device : device_of) {
    Part& part = (*parts)[device];
    const int64_t count = tie_counts({part.tensors[next[device]++]});
    for (int64_t i = 0; i < count; ++i) {
      int32_t& ties = part.ties[at[device]++];
      ties = static_cast<int32_t>(std::min<int64_t>(ties, left));
      left -= ties;
    }
  }
  for (Part& part : *parts) {
    for (const ScoreTable& table : part.tables) emulate_add_ties(table, score_blocks(table));
  }
  return true;
}

void test_selections(int kind, size_t devices) {
  Scores scores(kind);
  for (bool largest : {true, false}) {
    for (int64_t k :
         {int64_t{0}, int64_t{1}, scores.total / 1000, scores.total * 3 / 10, scores.total - 1, scores.total}) {
      expect(select_cpu(scores.tensors(0), k, largest, 1) == -1, "the CPU selects", k);
      std::vector<Part> parts(devices);
      std::vector<size_t> device_of;
      for (const ScoredTensor& tensor : scores.tensors(1)) {
        device_of.push_back(device_of.size() % devices);
        parts[device_of.back()].tensors.push_back(tensor);
      }
      for (Part& part : parts) {
        part.ties.resize(static_cast<size_t>(tie_counts(part.tensors)));
        part.tables = score_tables(part.tensors, part.ties.data());
        expect(part.tables.size() > 1, "more than one table");
      }
      expect(select(&parts, device_of, k, largest), "no NaN", k);
      expect(scores.bits[1] == scores.bits[0], "a GPU selects what the CPU does", k);
    }
  }
  if (devices > 1) return;
  scores.values[3][69999] = std::numeric_limits<float>::quiet_NaN();
  std::vector<Part> parts(1);
  parts[0].tensors = scores.tensors(1);
  parts[0].tables = score_tables(parts[0].tensors, nullptr);
  expect(!select(&parts, {}, 1, true), "a NaN is noticed", kind);
}

}  // namespace

void test_cuda_scores() {
  test_squares<float>();
  test_squares<double>();
  test_squares<BFloat16>();
  test_squares<Float16>();
  for (int kind = 0; kind < 4; ++kind) {
    for (size_t devices : {size_t{1}, size_t{3}}) test_selections(kind, devices);
  }
  std::printf("scores on a GPU: done\n");
}
