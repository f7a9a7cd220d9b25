// Memory in huge pages: the network's weights and its activations touch too many small ones for the TLB.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mnv4::engine {

class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* data() const { return data_; }
  // At least what was asked for.
  size_t bytes() const { return bytes_; }

  // Bytes held by all engines of the process.
  static size_t total();

 private:
  void release();

  char* data_ = nullptr;
  size_t bytes_ = 0;
  char* mapping_ = nullptr;
  size_t mapped_ = 0;
};

}  // namespace mnv4::engine
