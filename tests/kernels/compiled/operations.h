/* The elementwise instructions: E(name, type of the result, types of a, b and c, value). The name is the instruction's
   without rounding to nearest and accuracy; machine.py refuses every instruction whose name does not stand here. */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64;
typedef int8_t s8; typedef int16_t s16; typedef int32_t s32; typedef int64_t s64;
typedef unsigned __int128 u128; typedef __int128 s128;
typedef float f32; typedef double f64; typedef struct { f32 x, y; } f32x2;

static int noise; /* whether approximate instructions err as far as their definition allows */

static inline f32 as_float(u32 x) { f32 f; memcpy(&f, &x, 4); return f; }
static inline u32 as_bits(f32 f) { u32 x; memcpy(&x, &f, 4); return x; }
static inline f32 flushed(f32 f) { return as_bits(f) & 0x7f800000u ? f : as_float(as_bits(f) & 0x80000000u); }

/* f off by up to `ulps` units in the last place, by an amount that depends on f alone. Exact powers stay exact. */
static inline f32 approximate(f32 f, s32 ulps) {
  u32 x = as_bits(f), exponent = x & 0x7f800000u;
  s32 off = (s32)((x * 2654435761u >> 16) % (u32)(2 * ulps + 1)) - ulps;
  if (!noise || !(x & 0x7fffff) || !exponent || exponent >= 0x7f000000u) return f;
  return as_float(x + off);
}
static inline f32 from_bf16(u16 x) { return as_float((u32)x << 16); }
static inline u16 to_bf16(f32 f) {
  u32 x = as_bits(f);
  return (x & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (u16)((x + 0x7fffu + (x >> 16 & 1)) >> 16);
}
static inline f32 from_f16(u16 x) { _Float16 h; memcpy(&h, &x, 2); return (f32)h; }
static inline u16 to_f16(f32 f) { _Float16 h = (_Float16)f; u16 x; memcpy(&x, &h, 2); return x; }
static inline f32 least(f32 a, f32 b) { return a != a || b != b ? NAN : fminf(a, b); }
static inline f32 most(f32 a, f32 b) { return a != a || b != b ? NAN : fmaxf(a, b); }
static inline f32x2 pair(f32 x, f32 y) { f32x2 p = {x, y}; return p; }
static inline u32 permuted(u32 a, u32 b, u32 selector) {
  u64 bytes = (u64)b << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    u32 n = selector >> (4 * i) & 15, byte = bytes >> (8 * (n & 7)) & 255;
    result |= (n & 8 ? (byte & 128 ? 255 : 0) : byte) << (8 * i);
  }
  return result;
}
static inline u32 field(u32 x, u32 from, u32 bits) {
  from &= 255, bits &= 255;
  return from > 31 ? 0 : x >> from & (bits > 31 ? ~0u : (1u << bits) - 1);
}
static inline s32 signed_field(s32 x, u32 from, u32 bits) {
  from &= 255, bits &= 255;
  s32 moved = x >> (from > 31 ? 31 : from);
  return !bits ? 0 : bits + from > 31 ? moved : (s32)((u32)moved << (32 - bits)) >> (32 - bits);
}

#define BITWISE(E, t) \
  E(mov_##t, t, t, u8, u8, a) E(and_##t, t, t, t, u8, a & b) E(or_##t, t, t, t, u8, a | b) \
  E(xor_##t, t, t, t, u8, a ^ b) E(selp_##t, t, t, t, u8, c ? a : b)
#define WORD(E, t, bits) \
  BITWISE(E, t) E(not_##t, t, t, u8, u8, ~a) E(shl_##t, t, t, u32, u8, b >= bits ? 0 : a << b)
#define INTEGER(E, t, wide, bits) \
  E(add_##t, t, t, t, u8, a + b) E(sub_##t, t, t, t, u8, a - b) \
  E(mul_lo_##t, t, t, t, u8, (wide)a * (wide)b) E(mul_hi_##t, t, t, t, u8, (wide)a * (wide)b >> bits) \
  E(mad_lo_##t, t, t, t, t, (wide)a * (wide)b + c) \
  E(div_##t, t, t, t, u8, b ? (t)((wide)a / (wide)b) : (t)-1) E(rem_##t, t, t, t, u8, b ? (t)((wide)a % (wide)b) : a) \
  E(min_##t, t, t, t, u8, a < b ? a : b) E(max_##t, t, t, t, u8, a < b ? b : a) \
  E(setp_eq_##t, u8, t, t, u8, a == b) E(setp_ne_##t, u8, t, t, u8, a != b) \
  E(setp_lt_##t, u8, t, t, u8, a < b) E(setp_le_##t, u8, t, t, u8, a <= b) \
  E(setp_gt_##t, u8, t, t, u8, a > b) E(setp_ge_##t, u8, t, t, u8, a >= b)
#define SIGNED(E, t, bits) \
  E(neg_##t, t, t, u8, u8, -a) E(abs_##t, t, t, u8, u8, a < 0 ? -a : a) E(shr_##t, t, t, u32, u8, a >> (b >= bits ? bits - 1 : b))
#define UNSIGNED(E, t, bits) E(shr_##t, t, t, u32, u8, b >= bits ? 0 : a >> b)
#define WIDENING(E, t, wide) \
  E(mul_wide_##t, wide, t, t, u8, (wide)a * (wide)b) E(mad_wide_##t, wide, t, t, wide, (wide)a * (wide)b + c)
#define FROM(E, t) \
  E(cvt_u16_##t, u16, t, u8, u8, a) E(cvt_s16_##t, s16, t, u8, u8, a) E(cvt_u32_##t, u32, t, u8, u8, a) \
  E(cvt_s32_##t, s32, t, u8, u8, a) E(cvt_u64_##t, u64, t, u8, u8, a) E(cvt_s64_##t, s64, t, u8, u8, a) \
  E(cvt_f32_##t, f32, t, u8, u8, (f32)a)
#define COMPARISON(E, name, operator) /* u: true as well where a value is NaN */ \
  E(setp_##name##_f32, u8, f32, f32, u8, a operator b) \
  E(setp_##name##u_f32, u8, f32, f32, u8, a != a || b != b || a operator b)

#define ELEMENTWISE(E) \
  BITWISE(E, u8) WORD(E, u16, 16) WORD(E, u32, 32) WORD(E, u64, 64) E(not_pred, u8, u8, u8, u8, !a) \
  INTEGER(E, s16, s32, 16) INTEGER(E, u16, u32, 16) INTEGER(E, s32, s64, 32) INTEGER(E, u32, u64, 32) \
  INTEGER(E, s64, s128, 64) INTEGER(E, u64, u128, 64) \
  SIGNED(E, s16, 16) SIGNED(E, s32, 32) SIGNED(E, s64, 64) \
  UNSIGNED(E, u16, 16) UNSIGNED(E, u32, 32) UNSIGNED(E, u64, 64) \
  WIDENING(E, s16, s32) WIDENING(E, u16, u32) WIDENING(E, s32, s64) WIDENING(E, u32, u64) \
  FROM(E, u16) FROM(E, s16) FROM(E, u32) FROM(E, s32) FROM(E, u64) FROM(E, s64) \
  E(bfe_u32, u32, u32, u32, u32, field(a, b, c)) E(bfe_s32, s32, s32, u32, u32, signed_field(a, b, c)) \
  E(prmt_b32, u32, u32, u32, u32, permuted(a, b, c)) \
  E(shf_l_wrap_b32, u32, u32, u32, u32, ((u64)b << 32 | a) << (c & 31) >> 32) \
  E(shf_r_wrap_b32, u32, u32, u32, u32, ((u64)b << 32 | a) >> (c & 31)) \
  /* the halves of a register, and a register of halves */ \
  E(low_u32, u16, u32, u8, u8, a) E(high_u32, u16, u32, u8, u8, a >> 16) \
  E(low_u64, u32, u64, u8, u8, a) E(high_u64, u32, u64, u8, u8, a >> 32) \
  E(join_u32, u32, u16, u16, u8, (u32)b << 16 | a) E(join_u64, u64, u32, u32, u8, (u64)b << 32 | a) \
  /* float32 */ \
  E(add_f32, f32, f32, f32, u8, a + b) E(sub_f32, f32, f32, f32, u8, a - b) E(mul_f32, f32, f32, f32, u8, a * b) \
  E(fma_f32, f32, f32, f32, f32, fmaf(a, b, c)) E(div_f32, f32, f32, f32, u8, a / b) \
  E(div_approx_f32, f32, f32, f32, u8, approximate(a / b, 2)) \
  E(div_full_f32, f32, f32, f32, u8, approximate(a / b, 2)) \
  E(neg_f32, f32, f32, u8, u8, -a) E(abs_f32, f32, f32, u8, u8, fabsf(a)) \
  E(min_f32, f32, f32, f32, u8, fminf(a, b)) E(max_f32, f32, f32, f32, u8, fmaxf(a, b)) \
  E(min_NaN_f32, f32, f32, f32, u8, least(a, b)) E(max_NaN_f32, f32, f32, f32, u8, most(a, b)) \
  E(sqrt_f32, f32, f32, u8, u8, sqrtf(a)) E(rcp_f32, f32, f32, u8, u8, 1.0f / a) \
  E(sqrt_approx_ftz_f32, f32, f32, u8, u8, approximate(sqrtf(flushed(a)), 1)) \
  E(ex2_approx_f32, f32, f32, u8, u8, approximate(exp2f(a), 2)) \
  E(ex2_approx_ftz_f32, f32, f32, u8, u8, flushed(approximate(exp2f(flushed(a)), 2))) \
  E(rcp_approx_ftz_f32, f32, f32, u8, u8, flushed(approximate(1.0f / flushed(a), 1))) \
  E(rsqrt_approx_f32, f32, f32, u8, u8, approximate(1.0f / sqrtf(a), 2)) \
  E(rsqrt_approx_ftz_f32, f32, f32, u8, u8, flushed(approximate(1.0f / sqrtf(flushed(a)), 2))) \
  COMPARISON(E, eq, ==) COMPARISON(E, lt, <) COMPARISON(E, le, <=) COMPARISON(E, gt, >) COMPARISON(E, ge, >=) \
  E(setp_ne_f32, u8, f32, f32, u8, a == a && b == b && a != b) \
  E(setp_neu_f32, u8, f32, f32, u8, a != b) \
  E(setp_nan_f32, u8, f32, f32, u8, a != a || b != b) E(setp_num_f32, u8, f32, f32, u8, a == a && b == b) \
  E(cvt_rzi_s32_f32, s32, f32, u8, u8, a != a ? 0 : a >= 2147483648.f ? INT32_MAX : a <= -2147483648.f ? INT32_MIN : (s32)a) \
  /* two float32 in a register of 64 bits, on Blackwell */ \
  E(add_f32x2, f32x2, f32x2, f32x2, u8, pair(a.x + b.x, a.y + b.y)) \
  E(sub_f32x2, f32x2, f32x2, f32x2, u8, pair(a.x - b.x, a.y - b.y)) \
  E(mul_f32x2, f32x2, f32x2, f32x2, u8, pair(a.x * b.x, a.y * b.y)) \
  E(fma_f32x2, f32x2, f32x2, f32x2, f32x2, pair(fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y))) \
  /* 16 bits */ \
  E(cvt_f32_bf16, f32, u16, u8, u8, from_bf16(a)) E(cvt_f32_f16, f32, u16, u8, u8, from_f16(a)) \
  E(add_f32_bf16, f32, u16, f32, u8, from_bf16(a) + b) E(add_f32_f16, f32, u16, f32, u8, from_f16(a) + b) \
  E(sub_f32_bf16, f32, u16, f32, u8, from_bf16(a) - b) E(sub_f32_f16, f32, u16, f32, u8, from_f16(a) - b) \
  E(fma_f32_bf16, f32, u16, u16, f32, fmaf(from_bf16(a), from_bf16(b), c)) \
  E(fma_f32_f16, f32, u16, u16, f32, fmaf(from_f16(a), from_f16(b), c)) \
  E(cvt_bf16_f32, u16, f32, u8, u8, to_bf16(a)) E(cvt_f16_f32, u16, f32, u8, u8, to_f16(a)) \
  E(cvt_bf16x2_f32, u32, f32, f32, u8, (u32)to_bf16(a) << 16 | to_bf16(b)) \
  E(cvt_f16x2_f32, u32, f32, f32, u8, (u32)to_f16(a) << 16 | to_f16(b))
