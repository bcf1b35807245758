// Bits of the .lang payload: token i is bit (i % 8), counted from the least significant, of byte (i / 8).
//
// Only loops that numpy does slower are here; files, checks and messages are in language_bits.py. Every loop has the
// same three parts: single bits up to a byte border,
// whole bytes, single bits again.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace py = pybind11;

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "eight flags are read and written as one little-endian word"
#endif

// Contiguous bytes, taken as they are: a wrong dtype is an error, never a silent copy.
using Bytes = py::array_t<std::uint8_t, py::array::c_style>;
using Ids = py::array_t<std::int64_t, py::array::c_style>;

namespace {

// Eight flags (bytes 0 or 1) -> one byte. The product moves flag k from bit 8k to bit 56 + k without a carry.
inline std::uint8_t pack8(std::uint64_t flags) {
    return static_cast<std::uint8_t>((flags * 0x0102040810204080ULL) >> 56);
}

// One byte -> eight flags, looked up: copy the byte to eight bytes, keep bit k in byte k, turn "not zero" into 1.
struct UnpackTable {
    std::uint64_t flags[256]{};
    constexpr UnpackTable() {
        for (std::uint64_t byte = 0; byte < 256; ++byte) {
            const std::uint64_t picked = (byte * 0x0101010101010101ULL) & 0x8040201008040201ULL;
            flags[byte] = ((picked + 0x7F7F7F7F7F7F7F7FULL) >> 7) & 0x0101010101010101ULL;
        }
    }
};
constexpr UnpackTable kUnpack;

void check_range(const Bytes& packed, std::int64_t start, std::int64_t stop) {
    if (start < 0 || start > stop || stop > 8 * packed.size()) {
        throw std::out_of_range("bits [" + std::to_string(start) + ", " + std::to_string(stop) + ") are outside " +
                                std::to_string(packed.size()) + " bytes");
    }
}

// A byte mask with bits [low, high) set, 0 <= low <= high <= 8.
inline std::uint8_t mask(int low, int high) { return static_cast<std::uint8_t>((0xFF >> (8 - high)) & (0xFF << low)); }

// Writes the flags at `start` into bytes whose bits from `start` on are 0; returns how many flags are 1.
std::int64_t pack_into(Bytes packed, std::int64_t start, const Bytes& flags) {
    const std::int64_t count = flags.size(), limit = 8 * packed.size();
    if (start < 0 || start > limit || count > limit - start) {  // start + count may be no int64
        throw std::out_of_range(std::to_string(count) + " bits at " + std::to_string(start) + " do not fit " +
                                std::to_string(packed.size()) + " bytes");
    }
    const std::uint8_t* in = flags.data();
    std::uint8_t* out = packed.mutable_data();

    std::uint64_t seen = 0;
    std::int64_t ones = 0, i = 0;
    const auto pack_one = [&] {
        seen |= in[i];
        ones += in[i];
        out[(start + i) / 8] |= static_cast<std::uint8_t>(in[i] << ((start + i) % 8));
        ++i;
    };
    while (i < count && (start + i) % 8 != 0) pack_one();
    for (; i + 8 <= count; i += 8) {
        std::uint64_t word;
        std::memcpy(&word, in + i, 8);
        seen |= word;
        out[(start + i) / 8] = pack8(word);
        ones += static_cast<std::int64_t>((word * 0x0101010101010101ULL) >> 56);  // the sum of its bytes
    }
    while (i < count) pack_one();

    if (seen & ~0x0101010101010101ULL) {
        // Undo: whoever catches the error may go on writing at `start`.
        out[start / 8] &= mask(0, static_cast<int>(start % 8));
        const std::int64_t end = (start + count + 7) / 8;
        std::memset(out + start / 8 + 1, 0, static_cast<std::size_t>(end - start / 8 - 1));
        throw py::value_error("language bits must be 0 or 1");
    }
    return ones;
}

// Bits [start, stop) as bytes 0 or 1, at `out`.
void unpack(const std::uint8_t* in, std::int64_t start, std::int64_t stop, std::uint8_t* out) {
    std::int64_t i = start;
    for (; i < stop && i % 8 != 0; ++i) *out++ = (in[i / 8] >> (i % 8)) & 1;
    for (; i + 8 <= stop; i += 8, out += 8) std::memcpy(out, &kUnpack.flags[in[i / 8]], 8);
    for (; i < stop; ++i) *out++ = (in[i / 8] >> (i % 8)) & 1;
}

// What a training sample needs beside its token ids: their bits, read from the ranges [start, stop) that the ids were
// read from and laid one after another (0 for ids behind the last range, which are padding); and the largest id.
py::tuple tag(const Bytes& packed, const py::list& edges, const Ids& ids) {
    const std::int64_t size = ids.size();
    Bytes bits(size);
    std::uint8_t* out = bits.mutable_data();
    std::int64_t done = 0;
    for (std::size_t i = 0; i + 1 < edges.size(); i += 2) {
        const auto start = edges[i].cast<std::int64_t>(), stop = edges[i + 1].cast<std::int64_t>();
        check_range(packed, start, stop);
        if (stop - start > size - done) throw std::out_of_range("more bits than token ids");
        unpack(packed.data(), start, stop, out + done);
        done += stop - start;
    }
    std::memset(out + done, 0, static_cast<std::size_t>(size - done));
    std::int64_t largest = -1;
    const std::int64_t* id = ids.data();
    for (std::int64_t i = 0; i < size; ++i) largest = id[i] > largest ? id[i] : largest;
    return py::make_tuple(bits, largest);
}

// The number of ones among bits [start, stop).
std::int64_t count_ones(const Bytes& packed, std::int64_t start, std::int64_t stop) {
    check_range(packed, start, stop);
    if (start == stop) return 0;
    const std::uint8_t* in = packed.data();
    const std::int64_t first = start / 8, last = (stop - 1) / 8;
    const int low = static_cast<int>(start % 8), high = static_cast<int>((stop - 1) % 8) + 1;
    if (first == last) return __builtin_popcount(in[first] & mask(low, high));
    std::int64_t ones = __builtin_popcount(in[first] & mask(low, 8));
    std::int64_t i = first + 1;
    for (; i + 8 <= last; i += 8) {
        std::uint64_t word;
        std::memcpy(&word, in + i, 8);
        ones += __builtin_popcountll(word);
    }
    for (; i < last; ++i) ones += __builtin_popcount(in[i]);
    return ones + __builtin_popcount(in[last] & mask(0, high));
}

}  // namespace

PYBIND11_MODULE(_language_bits, module) {
    module.doc() = "Packed language bits: pack, count and read samples at any bit offset.";
    module.def("pack_into", &pack_into, py::arg("packed").noconvert(), py::arg("start"), py::arg("flags").noconvert());
    module.def("tag", &tag, py::arg("packed").noconvert(), py::arg("edges"), py::arg("ids").noconvert());
    module.def("count_ones", &count_ones, py::arg("packed").noconvert(), py::arg("start"), py::arg("stop"));
}
