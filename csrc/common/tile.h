// The two inner kernels of every product here. Accumulators stay in registers over the whole reduction.
#pragma once

#include "common/vector.h"

namespace tarp {
namespace TARP_ISA {

// One step of a reduction: an element of A times a row of B, added to the sums. Strides are in bytes.
struct FloatStep {
    using Packed = float;
    static constexpr int width = 1;  // depth that one step covers
    using Right = Vec;
    using Left = Vec;
    static TARP_INLINE Left left(const char* a) { return Vec::broadcast(reinterpret_cast<const float*>(a)); }
    static TARP_INLINE Left left_last(const char* a) { return left(a); }
    static TARP_INLINE Right right(const Packed* b) { return Vec::load(b); }
    static TARP_INLINE Vec add(Left a, Right b, Vec sum) { return fma(a, b, sum); }
    static TARP_INLINE Right load(const char* p) { return Vec::load(reinterpret_cast<const float*>(p)); }
    static TARP_INLINE Right load_first(const char* p, int n) {
        return Vec::load_first(reinterpret_cast<const float*>(p), n);
    }
    static constexpr int lanes = Vec::lanes;  // elements that `load` brings
};

#if defined(__AVX512BF16__)
// Two bfloat16 products a lane and step; B holds pairs that are adjacent in depth.
struct PairStep {
    using Packed = uint32_t;
    static constexpr int width = 2;
    using Right = __m512bh;
    using Left = __m512bh;
    static TARP_INLINE Left left(const char* a) {
        int32_t pair;
        memcpy(&pair, a, sizeof pair);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static TARP_INLINE Left left_last(const char* a) {  // the second half of the pair lies beyond the row
        uint16_t single;
        memcpy(&single, a, sizeof single);
        return (__m512bh)_mm512_set1_epi32(single);
    }
    static TARP_INLINE Right right(const Packed* b) { return (__m512bh)_mm512_loadu_si512(b); }
    static TARP_INLINE Vec add(Left a, Right b, Vec sum) { return {_mm512_dpbf16_ps(sum.v, a, b)}; }
    static TARP_INLINE Right load(const char* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static TARP_INLINE Right load_first(const char* p, int n) {
        return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
    }
    static constexpr int lanes = 2 * Vec::lanes;
};
#endif

// An outer-product tile makes two vectors of columns. With 32 registers 8 rows reach 98 % of the peak of one core; 12
// rows fall to 90 % where the row stride is a power of two, because 12 rows of A then share an 8-way cache set.
constexpr int kVectors = 2;
constexpr int kColumns = kVectors * Vec::lanes;
constexpr int kRows = Vec::lanes == 16 ? 8 : 6;
constexpr int kDotRows = Vec::lanes == 16 ? 6 : 3;
constexpr int kDotColumns = 4;

// The rows of a tile of A, `row` bytes apart.
struct Strided {
    const char* a;
    int64_t row;
    TARP_INLINE const char* at(int m) const { return a + m * row; }
    TARP_INLINE void advance(int64_t bytes) { a += bytes; }
};

// The rows of a tile of A, each where it lies: eight pointers and one offset fit into the integer registers.
template <int ROWS>
struct Scattered {
    const char* rows[ROWS];
    int64_t offset = 0;
    explicit TARP_INLINE Scattered(const char* const* given) {
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m) rows[m] = given[m];
    }
    TARP_INLINE const char* at(int m) const { return rows[m] + offset; }
    TARP_INLINE void advance(int64_t bytes) { offset += bytes; }
};

// C[m, n] = init[m, n] + Σ_k A[m, k] B[k, n] for ROWS rows and kColumns columns.
//
// A[m, k] lies a_step * (k / Step::width) bytes behind a.at(m); B is packed, b_row elements from step to step; init and
// C are rows of kColumns floats.
template <class Step, int ROWS, class Rows>
TARP_INLINE void outer_lines(int64_t depth, Rows a, int64_t a_step, const typename Step::Packed* b, int64_t b_row,
                             const float* init, int64_t init_row, float* c, int64_t c_row) {
    Vec sum[ROWS][kVectors];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[m][v] = Vec::load(init + m * init_row + v * Vec::lanes);
    for (int64_t k = depth / Step::width; k > 0; --k) {
        typename Step::Right right[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) right[v] = Step::right(b + v * Vec::lanes);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m) {
            const typename Step::Left left = Step::left(a.at(m));
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) sum[m][v] = Step::add(left, right[v], sum[m][v]);
        }
        a.advance(a_step);
        b += b_row;
    }
    if (Step::width == 2 && depth % 2) {
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v)
                sum[m][v] = Step::add(Step::left_last(a.at(m)), Step::right(b + v * Vec::lanes), sum[m][v]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[m][v].store(c + m * c_row + v * Vec::lanes);
}

template <class Step, int ROWS>
TARP_INLINE void outer_tile(int64_t depth, const char* a, int64_t a_row, int64_t a_step, const typename Step::Packed* b,
                            int64_t b_row, const float* init, int64_t init_row, float* c, int64_t c_row) {
    outer_lines<Step, ROWS>(depth, Strided{a, a_row}, a_step, b, b_row, init, init_row, c, c_row);
}

template <class Step, int ROWS>
TARP_INLINE void outer_tile(int64_t depth, const char* const* a, int64_t a_step, const typename Step::Packed* b,
                            int64_t b_row, const float* init, int64_t init_row, float* c, int64_t c_row) {
    outer_lines<Step, ROWS>(depth, Scattered<ROWS>(a), a_step, b, b_row, init, init_row, c, c_row);
}

// C[m, n] = Σ_k A[m, k] B[n, k] for ROWS rows and 4 columns: rows of adjacent elements on both sides, so nothing is
// packed; the lanes are summed at the end, which costs 5 % at a depth of 1000.
template <class Step, int ROWS, class Rows>
TARP_INLINE void dot_lines(int64_t depth, Rows a, const char* const* b, float* c, int64_t c_row) {
    Vec sum[ROWS][kDotColumns];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < kDotColumns; ++n) sum[m][n] = Vec::zero();
    constexpr int64_t element = Step::width == 2 ? 2 : 4;
    const char *b0 = b[0], *b1 = b[1], *b2 = b[2], *b3 = b[3];
    const int64_t whole = depth / Step::lanes * Step::lanes * element;
    for (int64_t k = 0; k < whole; k += Step::lanes * element) {
        const typename Step::Right right[kDotColumns] = {Step::load(b0 + k), Step::load(b1 + k), Step::load(b2 + k),
                                                         Step::load(b3 + k)};
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m) {
            const typename Step::Right left = Step::load(a.at(m) + k);
#pragma GCC unroll 4
            for (int n = 0; n < kDotColumns; ++n) sum[m][n] = Step::add(left, right[n], sum[m][n]);
        }
    }
    if (const int rest = static_cast<int>(depth % Step::lanes)) {
        const typename Step::Right right[kDotColumns] = {
            Step::load_first(b0 + whole, rest), Step::load_first(b1 + whole, rest), Step::load_first(b2 + whole, rest),
            Step::load_first(b3 + whole, rest)};
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m) {
            const typename Step::Right left = Step::load_first(a.at(m) + whole, rest);
#pragma GCC unroll 4
            for (int n = 0; n < kDotColumns; ++n) sum[m][n] = Step::add(left, right[n], sum[m][n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) store_sums(sum[m][0], sum[m][1], sum[m][2], sum[m][3], c + m * c_row);
}

template <class Step, int ROWS>
TARP_INLINE void dot_tile(int64_t depth, const char* a, int64_t a_row, const char* const* b, float* c, int64_t c_row) {
    dot_lines<Step, ROWS>(depth, Strided{a, a_row}, b, c, c_row);
}

template <class Step, int ROWS>
TARP_INLINE void dot_tile(int64_t depth, const char* const* a, const char* const* b, float* c, int64_t c_row) {
    dot_lines<Step, ROWS>(depth, Scattered<ROWS>(a), b, c, c_row);
}

// --- the same for any number of rows up to the tile's
// -------------------------------------------------------------------

template <class Step, int ROWS = kRows, class... Args>
TARP_INLINE void outer_rows(int64_t rows, Args... args) {
    if (rows == ROWS) return outer_tile<Step, ROWS>(args...);
    if constexpr (ROWS > 1) outer_rows<Step, ROWS - 1>(rows, args...);
}

template <class Step, int ROWS = kDotRows, class... Args>
TARP_INLINE void dot_rows(int64_t rows, Args... args) {
    if (rows == ROWS) return dot_tile<Step, ROWS>(args...);
    if constexpr (ROWS > 1) dot_rows<Step, ROWS - 1>(rows, args...);
}

}  // namespace TARP_ISA
}  // namespace tarp
