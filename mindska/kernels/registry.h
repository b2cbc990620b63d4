// The operators of all libraries that the process has loaded, by name: how one library finds those of another.
#pragma once

#include <cstdint>

extern "C" {
// What an operator's entry calls once its tensors are known to be those of its signature.
typedef int (*MindskaFunction)(int count, void **params, int *ranks, int64_t **shapes);

// Adds an operator; `name` and `signature` are kept as they are. Of two of a name, the last one counts.
bool mindska_add_operator(const char *name, const char *signature, MindskaFunction function);

// The signature of an operator, and its function; null where there is none of that name.
const char *mindska_find_operator(const char *name, MindskaFunction *function);
}
