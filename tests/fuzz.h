// What the functions of sanitize_fuzz.cpp share: random numbers, rounding to the narrower types, comparisons.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "common.h"

using namespace minidamage;

static std::mt19937 generator;
static const char* op = "";
static unsigned seed = 0;

static double uniform(double low, double high) { return low + (high - low) * (generator() / 4294967296.0); }
static int64_t integer(int64_t low, int64_t high) {
  return low + static_cast<int64_t>(generator() % static_cast<uint64_t>(high - low + 1));
}
static bool chance(double probability) { return uniform(0, 1) < probability; }

// Few channels, or as many as 16 bytes hold in the narrowest type: the forms of the CUDA kernels with wide loads.
static int64_t some_channels(int64_t least) { return chance(0.3) ? 8 : integer(least, 5); }

static void expect(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "sanitize_fuzz: %s, case %u: %s\n", op, seed, what);
  std::exit(1);
}

// What the emulated kernels store arrays in. The CPU's arrays hold the same numbers, rounded by stored().
static DType storage = DType::float32;

static bool is_half() { return storage == DType::float16 || storage == DType::bfloat16; }

// `exact` for float32 and float64, some units in the last place for the narrower types.
static double tolerance(double exact) { return storage == DType::float16 ? 2e-3 : storage == DType::bfloat16 ? 1.6e-2 : exact; }

template <typename S, typename T>
std::vector<S> narrowed(const std::vector<T>& numbers) {
  std::vector<S> result(numbers.size());
  for (size_t i = 0; i < numbers.size(); i++) result[i] = from_accumulate<S>(numbers[i]);
  return result;
}

template <typename S>
std::vector<accumulate_t<S>> widened(const std::vector<S>& numbers) {
  std::vector<accumulate_t<S>> result(numbers.size());
  for (size_t i = 0; i < numbers.size(); i++) result[i] = to_accumulate(numbers[i]);
  return result;
}

template <typename T>
std::vector<T> stored(std::vector<T> numbers) {
  with_storage<T>(storage, [&](auto zero) { numbers = widened(narrowed<decltype(zero)>(numbers)); });
  return numbers;
}

// A number up to `size`; in a nasty array one of eight is no ordinary one.
template <typename T>
T number(double size, bool nasty) {
  const double extremes[] = {NAN, INFINITY, -INFINITY, 3e38, -3e38, 1e30, 1e-40, 0};
  return static_cast<T>(nasty && chance(0.12) ? extremes[integer(0, 7)] : uniform(-size, size));
}

template <typename T>
std::vector<T> numbers(int64_t count, double size, bool nasty) {
  std::vector<T> result(static_cast<size_t>(count));
  for (T& x : result) x = number<T>(size, nasty);
  return result;
}

// Equal up to rounding, NaN and infinity included.
template <typename T>
void expect_close(const std::vector<T>& a, const std::vector<T>& b, double tolerance, const char* what) {
  for (size_t i = 0; i < a.size(); i++) {
    const double x = a[i], y = b[i];
    expect(x == y || (x != x && y != y) || std::abs(x - y) <= tolerance * (1 + std::abs(y)), what);
  }
}

// work(begin, end) over [0, count) in up to three ranges, the last one first.
template <typename Work>
void in_ranges(int64_t count, const Work& work) {
  int64_t a = integer(0, count), b = integer(0, count);
  if (a > b) std::swap(a, b);
  work(b, count), work(0, a), work(a, b);
}
