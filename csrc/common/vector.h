// One float vector per instruction set, and the few shuffles that the kernels need. The only place with intrinsics.
//
// Included by the *_cpu.cpp files, which are compiled once per instruction set; everything lies in namespace
// tarp::TARP_ISA so that the copies never meet.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#    pragma GCC diagnostic push
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own _mm512_undefined_* trip it
#    include <immintrin.h>
#    pragma GCC diagnostic pop
#endif

#define TARP_INLINE inline __attribute__((always_inline))

namespace tarp {
namespace TARP_ISA {

#if defined(__AVX512F__)

struct Vec {
    static constexpr int lanes = 16;
    __m512 v;

    static TARP_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
    static TARP_INLINE Vec broadcast(const float* p) { return {_mm512_set1_ps(*p)}; }
    static TARP_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static TARP_INLINE Vec load_first(const float* p, int n) {
        return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
    }
    TARP_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
};

TARP_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}

// The sums over the lanes of four vectors, side by side.
TARP_INLINE void store_sums(Vec a, Vec b, Vec c, Vec d, float* out) {
    const __m512 ab =
        _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));  // a b a b per 128 bits
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

#elif defined(__AVX2__)

struct Vec {
    static constexpr int lanes = 8;
    __m256 v;

    static TARP_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
    static TARP_INLINE Vec broadcast(const float* p) { return {_mm256_broadcast_ss(p)}; }
    static TARP_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static TARP_INLINE Vec load_first(const float* p, int n) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return {_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane))};
    }
    TARP_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
};

TARP_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}

TARP_INLINE void store_sums(Vec a, Vec b, Vec c, Vec d, float* out) {
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}

#else

// Plain code: four lanes that any compiler can map to whatever the machine has.
struct Vec {
    static constexpr int lanes = 4;
    typedef float Lanes __attribute__((vector_size(16)));
    Lanes v;

    static TARP_INLINE Vec zero() { return {Lanes{0, 0, 0, 0}}; }
    static TARP_INLINE Vec broadcast(const float* p) { return {Lanes{*p, *p, *p, *p}}; }
    static TARP_INLINE Vec load(const float* p) {
        Vec result;
        memcpy(&result.v, p, sizeof(Lanes));
        return result;
    }
    static TARP_INLINE Vec load_first(const float* p, int n) {
        Vec result = zero();
        for (int i = 0; i < n; ++i) result.v[i] = p[i];
        return result;
    }
    TARP_INLINE void store(float* p) const { memcpy(p, &v, sizeof(Lanes)); }
};

TARP_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return {a.v * b.v + c.v};
}

TARP_INLINE void store_sums(Vec a, Vec b, Vec c, Vec d, float* out) {
    const Vec in[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) out[i] = (in[i].v[0] + in[i].v[2]) + (in[i].v[1] + in[i].v[3]);
}

#endif

// --- bfloat16
// -----------------------------------------------------------------------------------------------------------

TARP_INLINE float widen(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

// To the nearest bfloat16, ties to even; NaN stays NaN.
TARP_INLINE uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

TARP_INLINE void widen_row(const uint16_t* source, int64_t count, float* target) {
    for (int64_t i = 0; i < count; ++i) target[i] = widen(source[i]);
}

TARP_INLINE void narrow_row(const float* source, int64_t count, uint16_t* target) {
    for (int64_t i = 0; i < count; ++i) target[i] = narrow(source[i]);
}

// --- transposition
// ------------------------------------------------------------------------------------------------------

#if defined(__AVX2__)

constexpr int kSquare = 8;

// kSquare rows of kSquare dwords, `stride` bytes apart, to columns `width` dwords apart. 256-bit shuffles also with
// AVX-512: the 16 x 16 form took 1.7 times as long per element.
TARP_INLINE void transpose_square(const char* source, int64_t stride, uint32_t* target, int64_t width) {
    __m256 r[8], t[8];
#    pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(source + i * stride));
#    pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#    pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    float* out = reinterpret_cast<float*>(target);
#    pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        _mm256_storeu_ps(out + c * width, _mm256_permute2f128_ps(r[c], r[4 + c], 0x20));
        _mm256_storeu_ps(out + (4 + c) * width, _mm256_permute2f128_ps(r[c], r[4 + c], 0x31));
    }
}

#else

constexpr int kSquare = 4;

TARP_INLINE void transpose_square(const char* source, int64_t stride, uint32_t* target, int64_t width) {
    for (int i = 0; i < kSquare; ++i) {
        uint32_t row[kSquare];
        memcpy(row, source + i * stride, sizeof row);
        for (int j = 0; j < kSquare; ++j) target[j * width + i] = row[j];
    }
}

#endif

}  // namespace TARP_ISA
}  // namespace tarp
