"""Unpacks RNC ProPack (method 1), the compression that games of the early nineties use."""

from dataclasses import dataclass

SIGNATURE = b"RNC\x01"
HEADER_LEN = 18

Codes = dict[tuple[int, int], int]
"""Values of Huffman codes. A key is the length of a code and its bits; the bit that is read first is the lowest."""


@dataclass
class Bits:
    """Reader of bits from little-endian 16-bit words, low bits first. Interleaved bytes follow the last word begun."""

    data: bytes
    position: int = 0
    waiting: int = 0
    num_waiting: int = 0

    def take(self, count: int) -> int:
        """Return the next bits as a number."""
        while self.num_waiting < count:
            word = int.from_bytes(self.data[self.position : self.position + 2], "little")
            self.waiting |= word << self.num_waiting
            self.num_waiting += 16
            self.position += 2
        value = self.waiting & ((1 << count) - 1)
        self.waiting >>= count
        self.num_waiting -= count
        return value

    def take_bytes(self, count: int) -> bytes:
        """Return unencoded bytes."""
        self.position += count
        return self.data[self.position - count : self.position]


def read_codes(bits: Bits) -> Codes:
    """Read a canonical Huffman code, which is defined by the lengths of the symbols' codes."""
    lengths = [bits.take(4) for _ in range(bits.take(5))]
    codes: Codes = {}
    code = 0
    for length in range(1, 16):
        for symbol, wanted in enumerate(lengths):
            if wanted == length:
                codes[length, int(f"{code:0{length}b}"[::-1], 2)] = symbol
                code += 1
        code <<= 1
    return codes


def read_number(bits: Bits, codes: Codes) -> int:
    """Read a number. It is stored as its size in bits, in Huffman code, and then its bits except the highest."""
    value = 0
    for length in range(1, 16):
        value |= bits.take(1) << (length - 1)
        size = codes.get((length, value))
        if size is not None:
            return size if size < 2 else bits.take(size - 1) | 1 << (size - 1)
    raise ValueError("damaged RNC data: no such code")


def unpack(data: bytes) -> bytes:
    """Return the unpacked content of `data`, which must begin with `SIGNATURE`.

    Raises:
        ValueError: the data are damaged.
    """
    if data[:4] != SIGNATURE:
        raise ValueError(f"RNC data must begin with {SIGNATURE!r}, got {data[:4]!r}")
    size, packed = (int.from_bytes(data[start : start + 4], "big") for start in (4, 8))
    bits, output = Bits(data[HEADER_LEN : HEADER_LEN + packed]), bytearray()
    bits.take(2)
    for _ in range(data[17]):
        literals, distances, lengths = (read_codes(bits) for _ in range(3))
        for left in range(bits.take(16), 0, -1):
            count = read_number(bits, literals)
            output += bits.take_bytes(count)
            if left > 1:
                start = len(output) - read_number(bits, distances) - 1
                for position in range(start, start + read_number(bits, lengths) + 2):
                    output.append(output[position])
    if len(output) != size:
        raise ValueError(f"damaged RNC data: {len(output)} bytes instead of {size}")
    return bytes(output)
