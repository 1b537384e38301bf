// e^x and log x in plain arithmetic: no call, no branch, no table, so that a loop over them becomes SIMD on a CPU, and both machines
// and the emulator give the same bits (up to fused multiply-adds on a GPU). float is computed here; double goes to the library.
#pragma once
#include <cstring>

#include "common.h"

namespace minidamage {

MD_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
MD_HD float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// e^x, 2 units in the last place. 0 below -87.33 (where float32 becomes subnormal), e^88 above 88; NaN stays NaN.
MD_HD float exp_of(float x) {
  const float low = x < -87.33f ? -87.33f : x, a = low > 88.f ? 88.f : low;
  const float shifted = a * 1.44269504f + 12582912.f;  // 1.5 2^23: the low bits now hold n = round(x / log 2)
  const float n = shifted - 12582912.f;
  const float r = (a - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n log 2, log 2 in two parts; |r| <= log(2) / 2
  float y = 1.9875691500e-4f;  // the polynomial of Cephes' expf
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.f;
  y = y * float_of((bits_of(shifted) << 23) + (127u << 23));  // times 2^n
  return x < -87.33f ? 0.f : y;
}
MD_HD double exp_of(double x) { return exp(x); }

// log(1 + x) for 0 <= x <= 1, 3 units in the last place: 2 atanh(s), s = x / (2 + x) <= 1/3, by its series. Relative, so right for tiny x.
MD_HD float log1p_of(float x) {
  const float s = x / (2.f + x), s2 = s * s;
  float y = 2.f / 13.f;
  y = y * s2 + 2.f / 11.f;
  y = y * s2 + 2.f / 9.f;
  y = y * s2 + 2.f / 7.f;
  y = y * s2 + 2.f / 5.f;
  y = y * s2 + 2.f / 3.f;
  return 2.f * s + y * s2 * s;
}
MD_HD double log1p_of(double x) { return log1p(x); }

// log x for normal x > 0, 2 units in the last place; -Inf for 0 and subnormal numbers, NaN for NaN and below 0.
MD_HD float log_of(float x) {
  const uint32_t sqrt_half = 0x3f3504f3u;
  const int32_t exponent = static_cast<int32_t>(bits_of(x) - sqrt_half) >> 23;
  const float f = float_of(bits_of(x) - (static_cast<uint32_t>(exponent) << 23));  // x / 2^exponent, between sqrt(1/2) and sqrt(2)
  const float s = (f - 1.f) / (f + 1.f), s2 = s * s;
  float y = 2.f / 9.f;
  y = y * s2 + 2.f / 7.f;
  y = y * s2 + 2.f / 5.f;
  y = y * s2 + 2.f / 3.f;
  const float n = static_cast<float>(exponent);
  const float result = (y * s2 * s + n * -2.12194440e-4f) + 2.f * s + n * 0.693359375f;
  return x >= 1.17549435e-38f ? result : x >= 0.f ? -INFINITY : NAN;
}
MD_HD double log_of(double x) { return log(x); }

}  // namespace minidamage
