// The signature of an operator, a text beside its code that states its inputs and outputs, and the check of it before
// anything runs:
//
//   x (B, C, H, W), weight (O, D, K, K), bias (O), options {dilation, relu} -> y (B, O, H, W)
//   where C % D == 0, O % (C / D) == 0, K % 2 == 1
//
// A name stands for the same number wherever it is; the numbers of `options`, an int32 array, have names as well. (...):
// one shape of any rank, the same wherever it is. (*): any shape. (B) or (1): the first that fits; the tensor's own name
// then stands for the number of the choice, from 0. `int32`, `uint8` after a shape: not float32. `+`: one or more
// such tensors, the last ones of the inputs. `/` rounds down. A tensor has at least one element. signatures.py reads the same texts: shapes are
// refused there first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace mindska {

constexpr int kWrongType = 2, kWrongShape = 3, kWrongValue = 4, kFailed = 5;  // MindSpore reports the number
constexpr int64_t kMaxElements = int64_t{1} << 36;  // no product of sizes overflows then

struct Refused : std::runtime_error {
  int code;
  explicit Refused(const std::string &why, int code = kWrongShape) : std::runtime_error(why), code(code) {}
};

// The types' names come from MindSpore in lower case, as the locale has it: a Turkish "Int32" has another first letter.
static inline bool is_type(const char *found, const char *expected) {
  return found && found[0] && std::strcmp(found + 1, expected + 1) == 0;
}

class Signature {
 public:
  Signature(const char *text, int count, void **data, const int *ranks, int64_t **shapes, const char **types)
      : at_(text), count_(count), data_(data), ranks_(ranks), shapes_(shapes), types_(types) {}

  // How many of the tensors are outputs.
  static int outputs(const char *text) {
    int count = 1, open = 0;
    const char *at = std::strstr(text, "->"), *end = std::strstr(text, " where ");
    for (; at && *at && at != end; ++at) {
      open += (*at == '(') - (*at == ')');
      count += *at == ',' && !open;
    }
    return count;
  }

  // Throws Refused where the tensors are not what the text says.
  void check() {
    int index = 0;
    for (int side = 0; side < 2; ++side) {  // inputs, outputs
      do index = tensors(index);
      while (take(","));
      if (side == 0) expect("->");
    }
    if (index != count_) throw Refused("there are " + std::to_string(count_) + " tensors, not " + std::to_string(index));
    for (const auto &[text, size] : deferred_) {
      at_ = text;
      if (expression() != size) throw Refused(std::string(text, at_) + " is not " + std::to_string(size));
    }
    at_ = conditions_;
    if (!at_) return;
    do {
      const char *start = at_;
      if (!condition()) throw Refused("not" + std::string(start, at_));
    } while (take(","));
  }

 private:
  using Sizes = std::vector<std::pair<std::string, int64_t>>;

  void spaces() {
    while (*at_ == ' ') ++at_;
  }

  bool take(const char *word) {
    spaces();
    const size_t length = std::strlen(word);
    if (std::strncmp(at_, word, length) != 0) return false;
    at_ += length;
    return true;
  }

  void expect(const char *word) {
    if (!take(word)) throw Refused(std::string("the signature lacks ") + word + " at " + at_);
  }

  std::string name() {
    spaces();
    std::string word;
    const auto is = [this](char first, char last) { return *at_ >= first && *at_ <= last; };
    while (is('0', '9') || is('a', 'z') || is('A', 'Z') || is('_', '_')) word += *at_++;
    return word;
  }

  // Learns a size; what is wrong, if it is another one already.
  std::string bind(const std::string &word, int64_t value) {
    for (const auto &[known, size] : sizes_) {
      if (known != word) continue;
      return size == value ? "" : word + " is " + std::to_string(size) + " and " + std::to_string(value);
    }
    sizes_.emplace_back(word, value);
    return "";
  }

  void elements(int index) const {
    int64_t total = 1;
    for (int i = 0; i < ranks_[index]; ++i) {
      const int64_t size = shapes_[index][i];
      if (size < 1) throw Refused("a tensor has no elements");
      if (__builtin_mul_overflow(total, size, &total) || total > kMaxElements) throw Refused("a tensor is too large");
    }
    if (!data_[index]) throw Refused("a tensor has no memory");
  }

  // One tensor, or all that a `+` stands for; the index after them.
  int tensors(int index) {
    const std::string tensor = name();
    const bool is_variadic = take("+");
    const int last = is_variadic ? count_ - 1 : index + 1;  // one output follows
    if (index >= last || last > count_) throw Refused("there are " + std::to_string(count_) + " tensors only");
    for (int i = index; i < last; ++i) elements(i);
    bool is_array = false;
    if (take("{")) {
      is_array = true;
      if (ranks_[index] != 1) throw Refused(tensor + " is not an array");
      type(tensor, index, "int32");
      int64_t i = 0;
      do {
        if (i == shapes_[index][0]) throw Refused(tensor + " is too short");
        const std::string why = bind(name(), static_cast<const int32_t *>(data_[index])[i++]);
        if (!why.empty()) throw Refused(why);
      } while (take(","));
      expect("}");
      if (i != shapes_[index][0]) throw Refused(tensor + " is too long");
    } else {
      choose(tensor, index);
    }
    const char *expected = take("int32") ? "int32" : take("uint8") ? "uint8" : "float32";
    for (int i = index; i < last && !is_array; ++i) type(tensor, i, expected);
    spaces();
    if (std::strncmp(at_, "where ", 6) == 0) conditions_ = at_ + 5, at_ += std::strlen(at_);
    return last;
  }

  void type(const std::string &tensor, int index, const char *expected) const {
    if (is_type(types_[index], expected)) return;
    throw Refused(tensor + " is " + (types_[index] ? types_[index] : "of no type") + ", not " + expected, kWrongType);
  }

  // The alternatives of a shape: the first that fits.
  void choose(const std::string &tensor, int index) {
    std::string first_reason;
    int64_t choice = 0, chosen = -1;
    do {
      const size_t sizes = sizes_.size(), expressions = deferred_.size();
      const char *start = at_;
      const std::string why = chosen < 0 ? shape(tensor, index) : "";
      if (!why.empty()) {
        sizes_.resize(sizes);
        deferred_.resize(expressions);
        if (first_reason.empty()) first_reason = why;
      } else if (chosen < 0) {
        chosen = choice;
      }
      at_ = start;
      skip_shape();
      ++choice;
    } while (take("or "));
    if (chosen < 0) throw Refused(first_reason);
    if (choice > 1) sizes_.emplace_back(tensor, chosen);
  }

  void skip_shape() {
    int open = 0;
    do {
      if (!*at_) throw Refused("the signature lacks )");
      open += (*at_ == '(') - (*at_ == ')');
    } while (*at_++ != ')' || open);
  }

  // What is wrong with a tensor's shape; empty where it fits. Expressions are left for later, when all sizes are known.
  std::string shape(const std::string &tensor, int index) {
    expect("(");
    const int64_t *sizes = shapes_[index];
    if (take("*")) return "";
    if (take("...")) {
      if (same_shape_ < 0) same_shape_ = index;
      const int rank = ranks_[index];
      const bool equal = ranks_[same_shape_] == rank && std::equal(sizes, sizes + rank, shapes_[same_shape_]);
      return equal ? "" : tensor + " has another shape";
    }
    int i = 0;
    do {
      if (i == ranks_[index]) return tensor + " has " + std::to_string(i) + " dimensions only";
      spaces();
      const char *start = at_;
      const std::string word = name();
      spaces();
      if ((*at_ == ',' || *at_ == ')') && !word.empty() && (word[0] < '0' || word[0] > '9')) {
        const std::string why = bind(word, sizes[i++]);
        if (!why.empty()) return why;
        continue;
      }
      deferred_.emplace_back(start, sizes[i++]);
      for (int open = 0; *at_ && (open || (*at_ != ',' && *at_ != ')')); ++at_) open += (*at_ == '(') - (*at_ == ')');
    } while (take(","));
    return i == ranks_[index] ? "" : tensor + " has " + std::to_string(ranks_[index]) + " dimensions";
  }

  int64_t factor() {
    if (take("(")) {
      const int64_t value = expression();
      expect(")");
      return value;
    }
    const std::string word = name();
    if (!word.empty() && word[0] >= '0' && word[0] <= '9') return std::stoll(word);
    for (const auto &[known, size] : sizes_) {
      if (known == word) return size;
    }
    throw Refused("nothing tells " + word);
  }

  int64_t term() {
    int64_t value = factor();
    for (;;) {
      spaces();
      const char sign = *at_;
      if (sign != '*' && sign != '/' && sign != '%') return value;
      ++at_;
      const int64_t other = factor();
      if (sign == '*') {
        if (__builtin_mul_overflow(value, other, &value)) throw Refused("a size is too large");
      } else {
        if (other < 1 || value < 0) throw Refused("a size is not positive");
        value = sign == '/' ? value / other : value % other;
      }
    }
  }

  int64_t expression() {
    int64_t value = term();
    for (;;) {
      const int sign = take("+ ") ? 1 : take("- ") ? -1 : 0;
      if (!sign) return value;
      if (__builtin_add_overflow(value, sign * term(), &value)) throw Refused("a size is too large");
    }
  }

  bool condition() {
    const int64_t left = expression();
    if (take("==")) return left == expression();
    if (take("<=")) return left <= expression();
    expect(">=");
    return left >= expression();
  }

  const char *at_, *conditions_ = nullptr;
  const int count_;
  void **data_;
  const int *ranks_;
  int64_t **shapes_;
  const char **types_;
  int same_shape_ = -1;  // the first tensor of the shape (...)
  Sizes sizes_;
  std::vector<std::pair<const char *, int64_t>> deferred_;  // expressions, and what they are to be
};

// Says on standard error why an operator did not run; a message of MindSpore's with the number follows.
static inline int report_refusal(const char *name, const char *why, int code, int count, const int *ranks,
                                 int64_t **shapes) {
  std::string found;
  for (int i = 0; i < count; ++i) {
    found += i ? ", (" : " (";
    for (int j = 0; j < ranks[i]; ++j) found += (j ? ", " : "") + std::to_string(shapes[i][j]);
    found += ")";
  }
  std::fprintf(stderr, "%s did not run: %s. Found%s\n", name, why, found.c_str());
  return code;
}

using Entry = int (*)(int, void **, int *, int64_t **);

// Runs the entry of an operator if its tensors are what the signature says; 0, or a number that MindSpore reports.
static inline int run_checked(const char *name, const char *signature, Entry function, int count, void **params,
                              int *ranks, int64_t **shapes, const char **types) {
  try {
    Signature(signature, count, params, ranks, shapes, types).check();
    return function(count, params, ranks, shapes);
  } catch (const Refused &refused) {
    return report_refusal(name, refused.what(), refused.code, count, ranks, shapes);
  } catch (const std::exception &error) {
    return report_refusal(name, error.what(), kFailed, count, ranks, shapes);
  }
}

}  // namespace mindska
