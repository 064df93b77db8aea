#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "state.h"

namespace natrpb::emulator {

namespace {

// The symbol that starts `offset` bytes behind the load address of an ELF file, or "".
std::string symbol_at(const char* path, uintptr_t offset) {
  std::ifstream file(path, std::ios::binary);
  const auto read = [&](uint64_t position, void* into, size_t bytes) {
    file.seekg(static_cast<std::streamoff>(position));
    file.read(static_cast<char*>(into), static_cast<std::streamsize>(bytes));
  };
  ElfW(Ehdr) header;
  read(0, &header, sizeof header);
  if (!file || std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return "";
  std::vector<ElfW(Shdr)> sections(header.e_shnum);
  read(header.e_shoff, sections.data(), sections.size() * sizeof sections[0]);
  for (const auto& section : sections) {
    if (section.sh_type != SHT_SYMTAB) continue;
    std::vector<ElfW(Sym)> symbols(section.sh_size / sizeof(ElfW(Sym)));
    read(section.sh_offset, symbols.data(), symbols.size() * sizeof symbols[0]);
    for (const auto& symbol : symbols) {
      if (symbol.st_value != offset || ELF64_ST_TYPE(symbol.st_info) != STT_FUNC) continue;
      file.seekg(static_cast<std::streamoff>(sections[section.sh_link].sh_offset + symbol.st_name));
      std::string name;
      std::getline(file, name, '\0');
      return name;
    }
  }
  return "";
}

}  // namespace

std::string function_name(const void* address) {
  Dl_info info{};
  if (!dladdr(address, &info) || !info.dli_fname) return "?";
  const uintptr_t base = reinterpret_cast<uintptr_t>(info.dli_fbase);
  const uintptr_t absolute = reinterpret_cast<uintptr_t>(address);
  std::string name = symbol_at(info.dli_fname, absolute - base);
  if (name.empty()) name = symbol_at(info.dli_fname, absolute);  // an executable linked at fixed addresses
  if (name.empty()) return "at " + std::to_string(absolute - base) + " of " + info.dli_fname;
  int status = 0;
  char* demangled = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  if (status == 0) name = demangled;
  std::free(demangled);
  return name;
}

}  // namespace natrpb::emulator
