// Threads: one parallel region whose members take slices of the work until none is left.
#pragma once

#include <cstdint>

namespace childtune {

// Calls slice(context, i) once for each i in [0, slices), on at most `threads` threads. They are those of the OpenMP
// runtime that is already in the process (torch's own), so that no second pool of threads competes with torch's.
void parallel_slices(int threads, int64_t slices, void (*slice)(void* context, int64_t i), void* context);

// "OpenMP" if such a runtime was found, else "std::thread".
const char* parallel_runtime();

}  // namespace childtune
