package kernel

import (
	"encoding/binary"
	"errors"
)

// lz4Legacy is the magic number of the format in which kernels are compressed:
// chunks of a little-endian length and one LZ4 block of at most 8 MiB each.
const lz4Legacy = 0x184C2102

const lz4Chunk = 8 << 20

var errLZ4 = errors.New("corrupt lz4 data")

// unpackLZ4 decompresses a legacy lz4 stream of at most limit bytes. What
// follows the last chunk is ignored: the kernel's build appends the length.
func unpackLZ4(b []byte, limit int) ([]byte, error) {
	if len(b) < 4 || binary.LittleEndian.Uint32(b) != lz4Legacy {
		return nil, errLZ4
	}
	b = b[4:]
	var out []byte
	for len(b) >= 4 {
		n := binary.LittleEndian.Uint32(b)
		if uint64(n) > uint64(len(b)-4) || n > lz4Chunk+lz4Chunk/255+16 {
			break
		}
		before := len(out)
		var err error
		if out, err = appendLZ4Block(out, b[4:4+n], min(limit, before+lz4Chunk)); err != nil {
			return nil, err
		}
		b = b[4+n:]
		if len(out)-before < lz4Chunk {
			break
		}
	}
	return out, nil
}

// appendLZ4Block decompresses one block behind dst, up to limit bytes in all.
// Matches reach back into this block only.
func appendLZ4Block(dst, b []byte, limit int) ([]byte, error) {
	start := len(dst)
	for len(b) > 0 {
		token := b[0]
		lit, rest, ok := lz4Length(b[1:], int(token>>4))
		if !ok || lit > len(rest) || lit > limit-len(dst) {
			return nil, errLZ4
		}
		dst = append(dst, rest[:lit]...)
		b = rest[lit:]
		if len(b) == 0 { // the last sequence has no match
			return dst, nil
		}
		if len(b) < 2 {
			return nil, errLZ4
		}
		off := int(binary.LittleEndian.Uint16(b))
		n, rest, ok := lz4Length(b[2:], int(token&15))
		n += 4
		if !ok || off == 0 || off > len(dst)-start || n > limit-len(dst) {
			return nil, errLZ4
		}
		b = rest
		dst = appendMatch(dst, off, n)
	}
	return nil, errLZ4
}

// appendMatch repeats n bytes from off bytes back; the two may overlap.
func appendMatch(dst []byte, off, n int) []byte {
	for n > 0 {
		m := min(n, off)
		dst = append(dst, dst[len(dst)-off:len(dst)-off+m]...)
		n -= m
	}
	return dst
}

// lz4Length reads the continuation bytes of a length that begins with n of a token.
func lz4Length(b []byte, n int) (int, []byte, bool) {
	if n < 15 {
		return n, b, true
	}
	for i, c := range b {
		n += int(c)
		if c != 255 {
			return n, b[i+1:], n <= lz4Chunk
		}
	}
	return 0, nil, false
}
