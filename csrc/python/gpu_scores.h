// Fisher scores on a GPU, and the selection among them, as Python calls them: checks the tensors, launches the kernels.
// Included by bindings.cpp only.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "cuda/score_plan.h"
#include "python/gpu_step.h"
#include "python/step_items.h"
#include "python/tensor_view.h"

namespace childtune {
namespace {

// Returns the memory of a tensor, after checking that it is contiguous, on the device, and of this dtype and size.
void* array_on(int device, const TensorView& t, uint8_t code, uint8_t bits, int64_t numel, const char* name) {
  if (!t.is(code, bits) || t.device != device || !t.contiguous() || t.numel() != numel)
    refuse(std::string(name) + " must be contiguous, on the device of the kernels, of the right dtype and size");
  return t.data;
}

bool is_aligned(const void* data, size_t size) { return reinterpret_cast<uintptr_t>(data) % size == 0; }

// Adds `weight * (grad * factor)^2` to a float32 score, where `factor` is `grad_factor`, times the clip factor if there
// is a `grad_clip`. `finite`, one uint8, becomes 0 if the gradient has an infinity or a NaN. With `grad_clip`,
// `memory_of(bytes)` must return a uint8 tensor on the device of at least that size, which must live until the GPU has
// done the work.
void accumulate_squares_on_gpu(const GpuKernels& gpu, const py::object& score, const py::object& grad, double weight,
                               double grad_factor, std::optional<double> grad_clip, const py::object& finite,
                               uintptr_t stream, const py::object& memory_of) {
  const Call call;
  const TensorView grads = view_tensor(grad.ptr()), scores = view_tensor(score.ptr());
  SquaresArgument argument{};
  argument.dtype = param_dtype(grads);
  argument.numel = grads.numel();
  if (grads.device != gpu.device() || !grads.contiguous())
    refuse("grad must be contiguous and on the device of the kernels");
  if (!grads.same_shape(scores)) refuse("score and grad must have one shape");
  argument.grad = grads.data;
  argument.score = static_cast<float*>(array_on(gpu.device(), scores, kCodeFloat, 32, argument.numel, "score"));
  argument.finite = static_cast<uint8_t*>(array_on(gpu.device(), view_tensor(finite.ptr()), kCodeUInt, 8, 1, "finite"));
  argument.weight = weight;
  argument.grad_factor = grad_factor;
  argument.vectors = is_aligned(grads.data, grads.bits == 16 ? 8 : 16) && is_aligned(scores.data, 16);
  if (argument.numel == 0) return;
  NormTable norm{};
  py::object memory;
  if (grad_clip) {
    norm.count = 1;
    norm.chunks = norm_chunks_of(argument.numel);
    norm.items[0] = {grads.data, nullptr, argument.numel, 0, argument.dtype};
    const int64_t bytes = static_cast<int64_t>(sizeof(double)) * (1 + norm.chunks);
    memory = memory_of(bytes);
    norm.tensor_sums = static_cast<double*>(gpu.place_of(memory, bytes));
    norm.chunk_sums = norm.tensor_sums + 1;
    argument.squares = norm.tensor_sums;
    argument.grad_clip = *grad_clip;
  }
  const py::gil_scoped_release no_gil;
  if (grad_clip) {
    gpu.launch(kNormChunks, &norm, norm_blocks(norm), stream);
    gpu.launch(kNormTensors, &norm, 1, stream);
  }
  gpu.launch(kAddSquares, &argument, squares_blocks(argument), stream);
}

// Views, in a Call, the scores, and the bits of their masks unless `bits` is nullptr.
std::vector<ScoredTensor> scored_tensors(const GpuKernels& gpu, const py::list& scores, const py::list* bits) {
  if (bits != nullptr && bits->size() != scores.size()) refuse("each tensor of scores must have its bits");
  std::vector<ScoredTensor> tensors;
  for (size_t i = 0; i < scores.size(); ++i) {
    const TensorView from = view_tensor(scores[i].ptr());
    const int64_t numel = from.numel();
    tensors.push_back(
        {static_cast<const float*>(array_on(gpu.device(), from, kCodeFloat, 32, numel, "scores")), nullptr, numel});
    if (bits == nullptr) continue;
    const TensorView to = view_tensor((*bits)[i].ptr());
    tensors[i].bits = static_cast<uint8_t*>(array_on(gpu.device(), to, kCodeUInt, 8, mask_bytes(numel), "bits"));
    if (!is_aligned(to.data, sizeof(uint32_t))) refuse("bits must be aligned to 4 bytes");
  }
  return tensors;
}

void launch_scores(const GpuKernels& gpu, size_t kernel, const std::vector<ScoreTable>& tables, uintptr_t stream) {
  const py::gil_scoped_release no_gil;
  for (const ScoreTable& table : tables) gpu.launch(kernel, &table, score_blocks(table), stream);
}

// Of the keys whose bits from `wanted_shift` on are `wanted`, counts those with each digit, which is their bits from
// `shift` up to `wanted_shift`. Adds to `counts`, int64. `nan`, one uint8, becomes 1 if a score is NaN.
void count_digits_on_gpu(const GpuKernels& gpu, const py::list& scores, bool largest, uint32_t wanted, int wanted_shift,
                         int shift, const py::object& counts, const py::object& nan, uintptr_t stream) {
  if (shift < 0 || wanted_shift <= shift || wanted_shift > 32 || wanted_shift - shift > kDigitBits)
    refuse("count_digits: a digit must have from 1 to 11 of 32 bits");
  const Call call;
  std::vector<ScoreTable> tables = score_tables(scored_tensors(gpu, scores, nullptr), nullptr);
  auto* to = static_cast<int64_t*>(array_on(gpu.device(), view_tensor(counts.ptr()), kCodeInt, 64, kDigits, "counts"));
  auto* flag = static_cast<uint8_t*>(array_on(gpu.device(), view_tensor(nan.ptr()), kCodeUInt, 8, 1, "nan"));
  for (ScoreTable& table : tables) {
    table.counts = to;
    table.nan = flag;
    table.flip = largest ? 0u : ~0u;
    table.wanted = wanted;
    table.wanted_shift = wanted_shift;
    table.shift = shift;
  }
  launch_scores(gpu, kCountDigits, tables, stream);
}

void launch_mask_pass(const GpuKernels& gpu, size_t kernel, const py::list& scores, bool largest, uint32_t threshold,
                      const py::list& bits, const py::object& ties, uintptr_t stream) {
  const Call call;
  const std::vector<ScoredTensor> tensors = scored_tensors(gpu, scores, &bits);
  void* to = array_on(gpu.device(), view_tensor(ties.ptr()), kCodeInt, 32, tie_counts(tensors), "ties");
  std::vector<ScoreTable> tables = score_tables(tensors, static_cast<int32_t*>(to));
  for (ScoreTable& table : tables) {
    table.flip = largest ? 0u : ~0u;
    table.wanted = threshold;
  }
  launch_scores(gpu, kernel, tables, stream);
}

// Writes the masks of the keys above `threshold`, and to `ties`, int32, how many keys equal it in each packed block of
// 1024 scores.
void write_above_on_gpu(const GpuKernels& gpu, const py::list& scores, bool largest, uint32_t threshold,
                        const py::list& bits, const py::object& ties, uintptr_t stream) {
  launch_mask_pass(gpu, kWriteAbove, scores, largest, threshold, bits, ties, stream);
}

// Adds to the masks the first keys that equal `threshold`: in each packed block, as many as `ties` says.
void add_ties_on_gpu(const GpuKernels& gpu, const py::list& scores, bool largest, uint32_t threshold,
                     const py::list& bits, const py::object& ties, uintptr_t stream) {
  launch_mask_pass(gpu, kAddTies, scores, largest, threshold, bits, ties, stream);
}

}  // namespace
}  // namespace childtune
