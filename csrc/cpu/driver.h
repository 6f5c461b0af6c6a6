// What the CPU does for whole lists of parameters: chooses the instruction set, cuts the work, and runs it on threads.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace childtune {

void step_cpu(const std::vector<StepItem>& items, int threads);

// Returns each gradient's sum of squares, added in an order that does not depend on threads or instruction set.
std::vector<double> sums_of_squares_cpu(const std::vector<StepItem>& items, int threads);

// Adds weight * (gradient * grad_factor)^2 to the scores. Returns whether every gradient was finite.
bool accumulate_squares_cpu(const SquaresItem& item, double weight, double grad_factor, int threads);

std::vector<std::string> supported_instruction_sets();  // of this processor, the widest last
std::string instruction_set();                          // the one in use; at first the widest
CpuKernels current_kernels();                           // the kernels of the one in use
bool set_instruction_set(const std::string& name);      // returns false if this processor lacks it

}  // namespace childtune
