// What a launcher returns: nothing, or a sentence about what is wrong. Library code never prints and never exits.
#pragma once

#include <string>
#include <utility>

namespace natrpb {

class Status {
 public:
  Status() = default;
  static Status error(std::string message) {
    Status status;
    status.message_ = std::move(message);
    return status;
  }
  bool ok() const { return message_.empty(); }
  const std::string& message() const { return message_; }

 private:
  std::string message_;
};

}  // namespace natrpb
