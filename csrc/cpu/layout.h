// Arrays that are not contiguous: copies between an array's elements, by logical index, and a small contiguous buffer.
#pragma once

#include "core/step_item.h"
#include "cpu/loops.h"

namespace childtune {

// Reads the layout of arrays of one shape: ndim, shape[ndim], strides[ndim] of each array.
struct Layout {
  int64_t ndim;
  const int64_t* shape;
  const int64_t* stride;  // of one array

  CHILDTUNE_MEMBER Layout(const int64_t* layout, int array)
      : ndim(layout[0]), shape(layout + 1), stride(layout + 1 + ndim * (1 + array)) {}

  // Returns the offset in memory, in elements, of the element with this logical index. Sets *run to how many elements
  // from there on lie at the distance stride[ndim - 1] from each other.
  CHILDTUNE_MEMBER int64_t offset(int64_t index, int64_t* run) const {
    int64_t at = 0;
    *run = ndim == 0 ? 1 : shape[ndim - 1] - index % shape[ndim - 1];
    for (int64_t d = ndim - 1; d >= 0; --d) {
      at += index % shape[d] * stride[d];
      index /= shape[d];
    }
    return at;
  }

  CHILDTUNE_MEMBER int64_t innermost_stride() const { return ndim == 0 ? 1 : stride[ndim - 1]; }
};

// Calls copy(memory offset, buffer position, count, stride) for each run of the elements [begin, begin + count).
template <class Copy>
CHILDTUNE_INLINE void for_each_run(const Layout& layout, int64_t begin, int64_t count, Copy copy) {
  for (int64_t done = 0; done < count;) {
    int64_t run;
    const int64_t at = layout.offset(begin + done, &run);
    if (run > count - done) run = count - done;
    copy(at, done, run, layout.innermost_stride());
    done += run;
  }
}

// Copies the elements [begin, begin + count) of array number `array` of a layout to `buffer`; nullptr: contiguous.
template <class T>
CHILDTUNE_OUT_OF_LINE void gather(const T* data, const int64_t* layout, int array, int64_t begin, int64_t count,
                                  T* buffer) {
  if (layout == nullptr) {
    memcpy(buffer, data + begin, count * sizeof(T));
    return;
  }
  for_each_run(Layout(layout, array), begin, count, [&](int64_t at, int64_t position, int64_t run, int64_t stride) {
    for (int64_t i = 0; i < run; ++i) buffer[position + i] = data[at + i * stride];
  });
}

template <class T>
CHILDTUNE_INLINE void gather(const StepItem& item, Stream stream, int64_t begin, int64_t count, T* buffer) {
  gather(static_cast<const T*>(item.data[stream]), item.layout, stream, begin, count, buffer);
}

// Copies `buffer` back to the elements [begin, begin + count).
template <class T>
CHILDTUNE_OUT_OF_LINE void scatter(const StepItem& item, Stream stream, int64_t begin, int64_t count, const T* buffer) {
  T* data = static_cast<T*>(item.data[stream]);
  if (item.layout == nullptr) {
    memcpy(data + begin, buffer, count * sizeof(T));
    return;
  }
  for_each_run(Layout(item.layout, stream), begin, count,
               [&](int64_t at, int64_t position, int64_t run, int64_t stride) {
                 for (int64_t i = 0; i < run; ++i) data[at + i * stride] = buffer[position + i];
               });
}

}  // namespace childtune
