#include "search_cell/search_cell.h"

#include "common/cpu_features.h"
#include "common/large_pages.h"

namespace tarp {

int64_t SearchCell::slots() const {
    int64_t count = 0;
    for (int edge = 0; edge < kEdges; ++edge)
        for (int map = 0; map < kMaps; ++map) {
            bool selected = false;
            for (int64_t task = 0; task < tasks; ++task)
                selected = selected || alpha[(task * kEdges + edge) * kOperations + kOperationOf[map]] != 0;
            count += selected;
        }
    return count;
}

#define TARP_FORWARD(isa) \
    case Isa::isa:        \
        return isa::search_cell_forward(op, io);
#define TARP_BACKWARD(isa) \
    case Isa::isa:         \
        return isa::search_cell_backward(op, io);

int64_t search_cell_forward(const SearchCell& op, const SearchCellForward& io) {
    prefer_large_pages(io.out, op.tokens * op.d * (op.bf16 ? 2 : 4));
    prefer_large_pages(io.nodes, 5 * op.array() * 4);
    switch (active_isa()) { TARP_BUILT_ISAS(TARP_FORWARD) }
    return 0;
}

int64_t search_cell_backward(const SearchCell& op, const SearchCellBackward& io) {
    prefer_large_pages(io.dx, op.tokens * op.d * (op.bf16 ? 2 : 4));
    switch (active_isa()) { TARP_BUILT_ISAS(TARP_BACKWARD) }
    return 0;
}

}  // namespace tarp
