// Layer norm and softmax over the values of each pixel.

#include "epilogue.h"

namespace quant2e {

void layer_norm(const Run&, const Step&) {}
void softmax(const Run&, const Step&) {}

}  // namespace quant2e
