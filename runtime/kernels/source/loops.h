// The loops of each instruction set, as templates over its vectors V (vectors/*.h). loops/ has a file per kind of loop.
//
// Each file in isa/ includes this file once. Everything has internal linkage, and only C functions of the standard
// library are used. Otherwise, code for one instruction set could be linked with an inline function compiled for
// another.
// Lanes are independent, or are always added in the same order, so that all instruction sets compute the same bits.
#pragma once
#include "instruction_set.h"
#include "loops/attention.h"
#include "loops/first_convolution.h"
#include "loops/int4.h"
#include "loops/int8.h"
#include "loops/normalization.h"
#include "loops/rounding.h"
#include "loops/routing.h"
#include "loops/time_convolution.h"

namespace {

template <class V>
constexpr InstructionSet loops_of(const char* name = V::kName) {
  return {name,      sizeof(typename V::Code), round8<V>,    round_bytes<V>, from_bytes<V>,
          multiply8<V>, multiply4<V>,          route<V>,
          V::kZero != 0 || sizeof(typename V::Code) > 1, V::kZero == 128 && sizeof(typename V::Code) == 1, convolve<V>,
          attend<V>, normalize<V>, see<V>, convolve_in_time<V>};
}

}  // namespace
