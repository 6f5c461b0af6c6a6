// A whole CPU step, over all parameters at once: instruction set, threads, and the cutting of the work.
#pragma once

#include <string>
#include <vector>

#include "cpu/step.h"

namespace childtune {

void step_cpu(const std::vector<StepItem>& items, int threads);

// The sum of squares of all gradients, in an order that does not depend on threads or instruction set.
double sum_of_squares_cpu(const std::vector<StepItem>& items, int threads);

// Adds the squares of all gradients to the scores; see CpuKernels. Returns whether every gradient was finite.
bool accumulate_squares_cpu(const std::vector<StepItem>& items, double weight, double grad_factor, int threads);

std::vector<std::string> supported_instruction_sets();  // of this processor, the widest last
std::string instruction_set();                          // the one in use; at first the widest
CpuKernels current_kernels();                           // and what is compiled for it
bool set_instruction_set(const std::string& name);      // false if this processor lacks it

}  // namespace childtune
