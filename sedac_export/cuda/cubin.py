"""What machine code for a GPU says of itself."""

import io
import struct
from typing import Any

from elftools.elf.elffile import ELFFile

# the constant that holds a struct Facts
FACTS = "sedac_facts"

# attributes of .nv.info: a format and a name of a byte each, then two bytes, which are the size of
# what follows in this format
_SIZED = 4
_REGISTERS = 0x2F


class Cubin:
    """An ELF file of the CUDA compiler. Raises ValueError where `code` is none."""

    def __init__(self, code: bytes) -> None:
        try:
            self._elf: Any = ELFFile(io.BytesIO(code))
            self._symbols: Any = self._elf.get_section_by_name(".symtab")
        except Exception as error:  # elftools fails in many ways on what is no ELF file
            raise ValueError("it is no machine code") from error

    @property
    def architecture(self) -> str:
        """Such as sm_90."""
        return f"sm_{self._elf.header.e_flags >> 8 & 255}"

    def facts(self) -> bytes:
        """The struct Facts that it holds, see abi.cuh; empty where there is none."""
        (symbol,) = self._symbols.get_symbol_by_name(FACTS) or (None,)
        if symbol is None:
            return b""
        start, size = symbol["st_value"], symbol["st_size"]
        held: bytes = self._elf.get_section(symbol["st_shndx"]).data()[start : start + size]
        return held

    def registers(self) -> dict[str, int]:
        """By entry, the registers of a thread."""
        data, place, found = self._elf.get_section_by_name(".nv.info").data(), 0, {}
        while place < len(data):
            form, name, size = struct.unpack_from("<BBH", data, place)
            place += 4
            if form == _SIZED and name == _REGISTERS:
                symbol, count = struct.unpack_from("<II", data, place)
                found[self._symbols.get_symbol(symbol).name] = count
            place += size if form == _SIZED else 0
        return found
