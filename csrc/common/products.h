// Three products over the tiles: the dense one with something riding along, a skinny one, and a tall-skinny one.
//
// No sum is ever split between threads, so every result has the same bits at any thread count.
#pragma once

#include <type_traits>

#include "common/factor_panels.h"
#include "common/scratch.h"

namespace tarp {
namespace TARP_ISA {

struct Range {
    int64_t begin, end;
};

// The share of one thread when `count` things are dealt in blocks of `grain`.
inline Range share(int64_t count, int64_t grain, int thread, int threads) {
    const int64_t blocks = (count + grain - 1) / grain;
    const int64_t begin = blocks * thread / threads * grain, end = blocks * (thread + 1) / threads * grain;
    return {smaller(begin, count), smaller(end, count)};
}

// C [rows, columns] = A Bᵀ for A [rows, depth] and B [columns, depth], both float rows; few columns.
inline void skinny(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, const float* b,
                   int64_t b_row, float* c, int64_t c_row) {
    for (int64_t m = 0; m < rows; m += kDotRows) {
        const int64_t some = smaller(kDotRows, rows - m);
        for (int64_t n = 0; n < columns; n += kDotColumns) {
            const char* right[kDotColumns];
            for (int j = 0; j < kDotColumns; ++j)  // beyond the last column the last one again, not stored
                right[j] = reinterpret_cast<const char*>(b + smaller(n + j, columns - 1) * b_row);
            float out[kDotRows][kDotColumns];
            dot_rows<FloatStep>(some, depth, reinterpret_cast<const char*>(a + m * a_row), a_row * 4, right, out[0],
                                int64_t{kDotColumns});
            for (int64_t i = 0; i < some; ++i)
                for (int64_t j = 0; j < smaller(kDotColumns, columns - n); ++j) c[(m + i) * c_row + n + j] = out[i][j];
        }
    }
}

// C [few, columns] (+)= Aᵀ B for A [rows, few] floats with row stride a_row and B [rows, width]: the gradient of a
// skinny product. Only columns [from, to) are made. C has row stride c_row.
//
// B passes through in blocks of kBlock rows, so that it is read once and the block's lines stay in cache while all
// tiles of C use them; 64 rows keep the reload of C's tile at 3 % of the work.
inline void tall(const Operand& b, int64_t row, int64_t rows, Range columns, const float* a, int64_t few, int64_t a_row,
                 float* c, int64_t c_row, const Dropout& dropout, int64_t width, Scratch& scratch) {
    constexpr int64_t kBlock = 64;
    const int64_t wide = columns.end - columns.begin;
    if (wide <= 0 || few == 0) return;
    for (int64_t i = 0; i < few; ++i)
        memset(c + i * c_row + columns.begin, 0, static_cast<size_t>(wide) * sizeof(float));
    const int64_t chunks = (few + kRows - 1) / kRows, chunk = (few + chunks - 1) / chunks;  // even shares of C's rows
    float* buffer = scratch.floats(kBlock * (wide + kColumns));
    float* edge = buffer + kBlock * wide;
    for (int64_t t = 0; t < rows; t += kBlock) {
        const int64_t depth = smaller(kBlock, rows - t);
        const FloatRows block = as_floats(b, row + t, depth, columns.begin, wide, buffer, dropout, width);
        for (int64_t n = 0; n < wide; n += kColumns) {
            const int64_t some = smaller(kColumns, wide - n);
            const float* right = block.data + n;
            int64_t stride = block.stride;
            // A tile reads whole vectors; and rows whose distance is a multiple of 1 KiB share a few sets of the cache.
            if (some < kColumns || stride % 256 == 0) {
                for (int64_t k = 0; k < depth; ++k)
                    if (some == kColumns)
                        memcpy(edge + k * kColumns, right + k * stride, kColumns * sizeof(float));
                    else
                        for (int64_t j = 0; j < kColumns; ++j)
                            edge[k * kColumns + j] = j < some ? right[k * stride + j] : 0;
                right = edge;
                stride = kColumns;
            }
            for (int64_t m = 0; m < few; m += chunk) {
                const int64_t count = smaller(chunk, few - m);
                const char* left = reinterpret_cast<const char*>(a + t * a_row + m);
                float* out = c + m * c_row + columns.begin + n;
                if (some == kColumns) {
                    outer_rows<FloatStep>(count, depth, left, int64_t{4}, a_row * 4, right, stride, out, c_row, out,
                                          c_row);
                    continue;
                }
                float tile[kRows][kColumns] = {};
                for (int64_t i = 0; i < count; ++i)
                    memcpy(tile[i], out + i * c_row, static_cast<size_t>(some) * sizeof(float));
                outer_rows<FloatStep>(count, depth, left, int64_t{4}, a_row * 4, right, stride, tile[0],
                                      int64_t{kColumns}, tile[0], int64_t{kColumns});
                for (int64_t i = 0; i < count; ++i)
                    memcpy(out + i * c_row, tile[i], static_cast<size_t>(some) * sizeof(float));
            }
        }
    }
}

// --- the dense product
// --------------------------------------------------------------------------------------------------

// C [rows, columns] = seed + A B, with A [rows, depth] of adjacent elements, B [depth, columns] any strides.
struct Dense {
    int64_t rows, depth, columns;
    Operand a, b;
    char* c;  // rows of adjacent elements of A's dtype
    int64_t c_row;
    const int64_t* c_index = nullptr;  // which rows of memory C's are, as in Operand
    const Factor* factor = nullptr;    // B is W or Wᵀ times it
    bool outputs = false;              // whether B's columns are W's outputs
    int64_t first_row = 0;             // what the seed calls row 0

    TARP_INLINE char* at(int64_t i, int64_t j) const {
        return c + ((c_index == nullptr ? i : c_index[i]) * c_row + j) * a.element();
    }
};

// Up to this many rows B is read in place where it is adjacent in depth; above, transposing it into panels costs less
// than the 5 % by which summing lanes is slower.
constexpr int64_t kDotLimit = 96;
// Panels that stay in the second-level cache beside the tiles of A and the part of B that is fetched for the next ones.
constexpr int64_t kPanelBytes = 192 * 1024;

inline void store_tile(const Dense& d, const float* tile, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    for (int64_t m = 0; m < rows; ++m) {
        const float* source = tile + m * kColumns;
        char* target = d.at(row + m, column);
        if (d.a.bf16)
            narrow_row(source, columns, reinterpret_cast<uint16_t*>(target));
        else
            memcpy(target, source, static_cast<size_t>(columns) * sizeof(float));
    }
}

// The tiles of rows of A that lie anywhere. Not inlined: the common case keeps its registers.
template <class Step, class... Args>
__attribute__((noinline)) void scattered_outer_rows(int64_t rows, Args... args) {
    outer_rows<Step>(rows, args...);
}

template <class Step, class... Args>
__attribute__((noinline)) void scattered_dot_rows(int64_t rows, Args... args) {
    dot_rows<Step>(rows, args...);
}

// Fetches a block of B into the second-level cache, a few lines at a time, so that the next group's part of B is on its
// way from memory while the panels of this one are used: up to a tenth less time at 64 to 256 rows.
class Ahead {
  public:
    Ahead(const Operand& b, int64_t depth, int64_t column, int64_t columns) {
        if (columns <= 0 || (b.row != 1 && b.column != 1)) return;
        const bool deep = b.row == 1;  // adjacent in depth: one run for each column
        next_ = b.at(0, column);
        stride_ = (deep ? b.column : b.row) * b.element();
        bytes_ = (deep ? depth : columns) * b.element();
        runs_ = deep ? columns : depth;
    }

    // How many lines each of `calls` calls has to fetch.
    int64_t quota(int64_t calls) const { return (runs_ * (bytes_ / kLine + 1) + calls - 1) / calls; }

    TARP_INLINE void fetch(int64_t lines) {
        for (; lines > 0 && runs_ > 0; --lines) {
            __builtin_prefetch(next_ + offset_, 0, 2);
            offset_ += kLine;
            if (offset_ >= bytes_) {
                next_ += stride_;
                offset_ = 0;
                --runs_;
            }
        }
    }

  private:
    static constexpr int64_t kLine = 64;
    const char* next_ = nullptr;
    int64_t stride_ = 0, bytes_ = 0, runs_ = 0, offset_ = 0;
};

// Columns `mine` of C by panels: pack some panels of B, then pass all rows of A by them. Seed::begin(column, panels)
// prepares a group of panels, Seed::fill(panel, row, rows, tile) gives what a tile starts from.
template <class Step, class Seed>
inline void dense_panels(const Dense& d, Range mine, Seed& seed, Scratch& scratch, bool widened) {
    using Packed = typename Step::Packed;
    const int64_t steps = (d.depth + Step::width - 1) / Step::width, panel_size = steps * kColumns;
    int64_t group = kPanelBytes / (panel_size * 4 + 1);
    group = group < 1 ? 1 : group > 8 ? 8 : group;
    const int64_t left_size = widened ? kRows * d.depth : 0;
    char* memory = static_cast<char*>(scratch.get((group * panel_size + left_size) * 4 + 256));
    Packed* panels = reinterpret_cast<Packed*>(memory);
    float* left_buffer = reinterpret_cast<float*>(memory + group * panel_size * 4);
    // One tile of rows reads B once, so it may as well read it where it lies.
    const bool in_place = d.factor == nullptr && !widened && Step::width == 1 && d.rows <= kRows && d.b.column == 1;
    for (int64_t first = mine.begin; first < mine.end; first += group * kColumns) {
        const int64_t last = smaller(first + group * kColumns, mine.end),
                      count = (last - first + kColumns - 1) / kColumns;
        for (int64_t p = 0; p < count; ++p) {
            const int64_t column = first + p * kColumns, some = smaller(kColumns, last - column);
            if (!in_place || some < kColumns) pack(d.b, d.depth, column, some, panels + p * panel_size);
            if constexpr (std::is_same_v<Packed, float>)
                if (d.factor != nullptr) weigh(*d.factor, d.outputs, column, some, panels + p * panel_size);
        }
        seed.begin(first, count);
        Ahead ahead(d.b, d.depth, last, in_place ? 0 : smaller(group * kColumns, mine.end - last));
        const int64_t lines_each = ahead.quota((d.rows + kRows - 1) / kRows * count);
        for (int64_t row = 0; row < d.rows; row += kRows) {
            const int64_t rows = smaller(kRows, d.rows - row);
            const char* left = d.a.at(row, 0);
            int64_t left_row = d.a.row * d.a.element();
            if (widened) {
                const FloatRows wide = as_floats(d.a, row, rows, 0, d.depth, left_buffer, Dropout{}, d.depth);
                left = reinterpret_cast<const char*>(wide.data);
                left_row = wide.stride * 4;
            }
            const bool run = widened || in_a_run(d.a.index, row, rows), stored_run = in_a_run(d.c_index, row, rows);
            const char* lines[kRows];
            if (!run)
                for (int64_t m = 0; m < kRows; ++m) lines[m] = d.a.at(row + smaller(m, rows - 1), 0);
            for (int64_t p = 0; p < count; ++p) {
                const int64_t column = first + p * kColumns, some = smaller(kColumns, last - column);
                float tile[kRows * kColumns];
                ahead.fetch(lines_each);
                seed.fill(p, d.first_row + row, rows, tile);
                // Whether the tile can be stored where it belongs.
                const bool direct = !d.a.bf16 && some == kColumns && stored_run;
                float* out = direct ? reinterpret_cast<float*>(d.at(row, column)) : tile;
                const bool packed = !in_place || some < kColumns;
                const Packed* right =
                    packed ? panels + p * panel_size : reinterpret_cast<const Packed*>(d.b.at(0, column));
                const int64_t right_row = packed ? int64_t{kColumns} : d.b.row;
                const int64_t out_row = direct ? d.c_row : int64_t{kColumns};
                if (run)
                    outer_rows<Step>(rows, d.depth, left, left_row, int64_t{4}, right, right_row,
                                     static_cast<const float*>(tile), int64_t{kColumns}, out, out_row);
                else
                    scattered_outer_rows<Step>(rows, d.depth, static_cast<const char* const*>(lines), int64_t{4}, right,
                                               right_row, static_cast<const float*>(tile), int64_t{kColumns}, out,
                                               out_row);
                if (!direct) store_tile(d, tile, row, rows, column, some);
            }
        }
    }
}

// Columns `mine` of C for few rows, B adjacent in depth: dot products, nothing packed.
template <class Step, class Seed>
inline void dense_dots(const Dense& d, Range mine, Seed& seed) {
    for (int64_t first = mine.begin; first < mine.end; first += kColumns) {
        const int64_t some = smaller(kColumns, mine.end - first);
        seed.begin(first, 1);
        for (int64_t row = 0; row < d.rows; row += kDotRows) {
            const int64_t rows = smaller(kDotRows, d.rows - row);
            float tile[kRows * kColumns], out[kDotRows][kDotColumns];
            seed.fill(0, d.first_row + row, rows, tile);
            const bool run = in_a_run(d.a.index, row, rows);
            const char *left = d.a.at(row, 0), *lines[kDotRows];
            if (!run)
                for (int64_t m = 0; m < kDotRows; ++m) lines[m] = d.a.at(row + smaller(m, rows - 1), 0);
            for (int64_t n = 0; n < some; n += kDotColumns) {
                const char* right[kDotColumns];
                for (int j = 0; j < kDotColumns; ++j) right[j] = d.b.at(0, first + smaller(n + j, some - 1));
                if (run)
                    dot_rows<Step>(rows, d.depth, left, d.a.row * d.a.element(), right, out[0], int64_t{kDotColumns});
                else
                    scattered_dot_rows<Step>(rows, d.depth, static_cast<const char* const*>(lines), right, out[0],
                                             int64_t{kDotColumns});
                for (int64_t m = 0; m < rows; ++m)
                    for (int64_t j = 0; j < smaller(kDotColumns, some - n); ++j)
                        tile[m * kColumns + n + j] += out[m][j];
            }
            store_tile(d, tile, row, rows, first, some);
        }
    }
}

template <class Seed>
inline void dense(const Dense& d, Range mine, Seed& seed, Scratch& scratch) {
    if (d.rows == 0) return;
    if (d.factor != nullptr) return dense_panels<FloatStep>(d, mine, seed, scratch, d.a.bf16);
    const bool dots = d.b.row == 1 && d.rows <= kDotLimit;
    if (!d.a.bf16)
        return dots ? dense_dots<FloatStep>(d, mine, seed) : dense_panels<FloatStep>(d, mine, seed, scratch, false);
#if defined(__AVX512BF16__)
    return dots ? dense_dots<PairStep>(d, mine, seed) : dense_panels<PairStep>(d, mine, seed, scratch, false);
#else
    return dense_panels<FloatStep>(d, mine, seed, scratch, true);
#endif
}

}  // namespace TARP_ISA
}  // namespace tarp
