#include "engine/program.h"

namespace mnv4::engine {
namespace {

int64_t arrays_of(Kind kind) {
  switch (kind) {
    case Kind::kConv:
    case Kind::kDepthwise:
    case Kind::kPointwise:
    case Kind::kLinear:
      return 2;
    case Kind::kAttention:
      return 14;
    default:
      return 0;
  }
}

}  // namespace

std::vector<Node> decode(const int64_t* rows, int64_t count, int64_t arrays, std::string* error) {
  std::vector<Node> nodes(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    Node& node = nodes[static_cast<size_t>(i)];
    const int64_t* row = rows + i * kFields;
#define MNV4_ENGINE_FIELD(name) node.name = *row++;
    MNV4_ENGINE_FIELDS(MNV4_ENGINE_FIELD)
#undef MNV4_ENGINE_FIELD
    const bool first = i == 0;
    const bool known = node.kind >= 0 && node.kind <= static_cast<int64_t>(Kind::kOutput);
    const bool ordered = first ? node.what() == Kind::kInput : node.input >= 0 && node.input < i && node.residual < i;
    const bool present = known && node.weight >= 0 && node.weight + arrays_of(node.what()) <= arrays;
    if (!known || !ordered || !present) {
      *error = "`program` row " + std::to_string(i) + " must have a known kind, earlier inputs and existing arrays";
      return {};
    }
  }
  return nodes;
}

}  // namespace mnv4::engine
