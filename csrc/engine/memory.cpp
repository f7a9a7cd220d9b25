#include "engine/memory.h"

#include <sys/mman.h>

#include <atomic>
#include <new>
#include <utility>

namespace mnv4::engine {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

std::atomic<size_t> held{0};

}  // namespace

Memory::Memory(size_t bytes) {
  if (bytes == 0) return;
  // a small block takes ordinary pages; a large one is whole huge pages, for an advised part of one stays small pages
  const bool huge = bytes >= kHugePage / 4;
  bytes_ = huge ? (bytes + kHugePage - 1) / kHugePage * kHugePage : bytes;
  mapped_ = bytes_ + (huge ? kHugePage : 0);
  void* mapping = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(mapping);
  data_ = mapping_;
  if (huge) {
    data_ += (kHugePage - reinterpret_cast<uintptr_t>(mapping_) % kHugePage) % kHugePage;
    // advice: a kernel without huge pages ignores it
    madvise(data_, bytes_, MADV_HUGEPAGE);
  }
  held += bytes_;
}

Memory::~Memory() { release(); }

Memory::Memory(Memory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      mapping_(std::exchange(other.mapping_, nullptr)),
      mapped_(std::exchange(other.mapped_, 0)) {}

Memory& Memory::operator=(Memory&& other) noexcept {
  if (this != &other) {
    release();
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
    mapping_ = std::exchange(other.mapping_, nullptr);
    mapped_ = std::exchange(other.mapped_, 0);
  }
  return *this;
}

void Memory::release() {
  if (!mapping_) return;
  munmap(mapping_, mapped_);
  held -= bytes_;
  mapping_ = nullptr;
}

size_t Memory::total() { return held.load(); }

}  // namespace mnv4::engine
