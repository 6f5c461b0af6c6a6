// Unit tests of the child network's kernels: the compact step and the selection. Called by test_core.cpp's main.
#include <cmath>
#include <limits>
#include <vector>

#include "core/adamw.h"
#include "core/packed_mask.h"
#include "cpu/driver.h"
#include "cpu/select.h"
#include "test_helpers.h"

// The compact step equals a plain loop over the child network's weights, and touches no other.
template <class P>
static void test_child_step(bool amsgrad, int64_t stride, bool decay_outside, uint32_t density) {
  for (int64_t n : {1, 3, 7, 8, 11, 24, 128, 1023, 1024, 1025, 70001}) {
    ChildMask mask(n, density);
    auto& [bits, offsets, children] = mask;
    const int64_t count = mask.count();
    Arrays<P> fast(n, stride), plain(n, stride);
    fast.keep_child(count);
    plain.keep_child(count);
    StepItem item = fast.item(false, amsgrad, {});
    item.child = mask.packed();
    item.decay_outside = decay_outside;
    step_cpu({item}, 2);
    const auto c = item.constants.cast<typename Arrays<P>::T>();
    for (int64_t i = 0, at = 0; i < n; ++i) {
      P& stored = plain.param[i * stride];
      typename Arrays<P>::T param = load(stored), unused = 0;
      if (in_child(bits.data(), i)) {
        const auto grad = load(plain.grad[i * stride]);
        auto &m = plain.state[0][at], &v = plain.state[1][at];
        amsgrad ? adamw_update<true>(c, true, grad, param, m, v, plain.state[2][at])
                : adamw_update<false>(c, true, grad, param, m, v, unused);
        ++at;
        store(stored, param);
      } else if (decay_outside) {
        store(stored, param * c.decay_before * c.decay_after);
      }
    }
    expect(same_bytes(fast.param, plain.param), "child step: param equals the plain loop's", n);
    for (int k = 0; k < 3; ++k) expect(same_bytes(fast.state[k], plain.state[k]), "child step: state", n);
    if (count == 0) continue;
    // Damaged masks must not make the step leave its arrays: the sanitizers watch. First more bits than were counted,
    // so that the state has no room for them, and bits beyond the last weight; then offsets that are wrong.
    bits[children[0] / 8] = n >= 8 ? 0xFF : bits[0];
    if ((n + 7) / 8 < mask_bytes(n)) bits[(n + 7) / 8] = 0xFF;
    item.child.count = count - 1;
    step_cpu({item}, 1);
    for (int64_t wrong : {INT64_MAX, INT64_MIN, int64_t{-1}, count + 1}) {
      offsets[0] = wrong;
      step_cpu({item}, 1);
    }
  }
}

template <class P>
static void test_child_steps_typed() {
  for (int64_t stride : {1, 3}) {
    for (uint32_t density : {0u, 1u, 30u, 100u}) {
      test_child_step<P>(false, stride, density == 30, density);
      test_child_step<P>(true, stride, false, density);
    }
  }
}

void test_child_steps() {
  test_child_steps_typed<float>();
  test_child_steps_typed<double>();
  test_child_steps_typed<BFloat16>();
}

// A weight must be selected if fewer than k others are ahead of it, which is counted here for each weight.
void test_selection() {
  std::vector<std::vector<float>> scores;
  for (int64_t n : {0, 1, 1023, 1024, 2500}) {
    scores.emplace_back();
    for (int64_t i = 0; i < n; ++i) scores.back().push_back(std::round(noise(static_cast<uint32_t>(i), 9) * 20) / 8);
  }
  std::vector<std::vector<uint8_t>> bits;
  std::vector<float> flat;
  for (const auto& s : scores) {
    bits.emplace_back(mask_bytes(static_cast<int64_t>(s.size())), 0xFF);
    flat.insert(flat.end(), s.begin(), s.end());
  }
  std::vector<ScoredTensor> tensors;
  for (size_t t = 0; t < scores.size(); ++t) {
    tensors.push_back({scores[t].data(), bits[t].data(), static_cast<int64_t>(scores[t].size())});
  }
  for (int64_t k : {int64_t{0}, int64_t{1}, int64_t{1500}, static_cast<int64_t>(flat.size())}) {
    expect(select_cpu(tensors, k, true, 2) == -1, "selection finds no NaN", k);
    size_t at = 0;
    for (size_t t = 0; t < scores.size(); ++t) {
      for (size_t i = 0; i < 8 * bits[t].size(); ++i) {
        int64_t ahead = i < scores[t].size() ? 0 : k;
        if (i < scores[t].size()) {
          for (size_t j = 0; j < flat.size(); ++j)
            ahead += flat[j] > flat[at + i] || (flat[j] == flat[at + i] && j < at + i);
        }
        expect((bits[t][i / 8] >> i % 8 & 1) == (ahead < k), "selection", static_cast<long long>(at + i));
      }
      at += scores[t].size();
    }
  }
  scores[3][7] = std::numeric_limits<float>::quiet_NaN();
  expect(select_cpu(tensors, 1, true, 2) == 3, "selection names the tensor with a NaN");
}
