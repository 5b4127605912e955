package agentproto

import "encoding/binary"

// The few CBOR forms (RFC 8949) that every frame has are read and written by
// hand: the library copies a payload twice, which doubles the cost of bulk data.

const (
	majorUint  = 0
	majorBytes = 2
	majorText  = 3
)

// headLen is the length of the head that appendHead writes for n.
func headLen(n int) int {
	switch {
	case n < 24:
		return 1
	case n < 1<<8:
		return 2
	case n < 1<<16:
		return 3
	}
	return 5
}

// appendHead appends the initial bytes of an item of a major type with argument n.
func appendHead(b []byte, major byte, n int) []byte {
	switch headLen(n) {
	case 1:
		return append(b, major<<5|byte(n))
	case 2:
		return append(b, major<<5|24, byte(n))
	case 3:
		return binary.BigEndian.AppendUint16(append(b, major<<5|25), uint16(n))
	}
	return binary.BigEndian.AppendUint32(append(b, major<<5|26), uint32(n))
}

// takeHead reads an item head of the wanted major type and returns its argument.
func takeHead(b []byte, major byte) (n uint32, rest []byte, ok bool) {
	if len(b) == 0 || b[0]>>5 != major {
		return 0, nil, false
	}
	info, b := b[0]&0x1f, b[1:]
	switch {
	case info < 24:
		return uint32(info), b, true
	case info == 24 && len(b) >= 1:
		return uint32(b[0]), b[1:], true
	case info == 25 && len(b) >= 2:
		return uint32(binary.BigEndian.Uint16(b)), b[2:], true
	case info == 26 && len(b) >= 4:
		return binary.BigEndian.Uint32(b), b[4:], true
	}
	return 0, nil, false
}

// takeString reads a definite-length byte or text string.
func takeString(b []byte, major byte) (s, rest []byte, ok bool) {
	n, b, ok := takeHead(b, major)
	if !ok || uint64(n) > uint64(len(b)) {
		return nil, nil, false
	}
	return b[:n:n], b[n:], true
}

// decodeEnvelope reads the usual form of an envelope: a map of exactly v, t and
// p in any order. Anything else is left to the library (ok false).
func decodeEnvelope(b []byte) (typ string, v uint8, payload []byte, ok bool) {
	if len(b) == 0 || b[0] != 0xa3 {
		return "", 0, nil, false
	}
	b = b[1:]
	var seen [3]bool
	for range 3 {
		key, rest, ok := takeString(b, majorText)
		if !ok || len(key) != 1 {
			return "", 0, nil, false
		}
		field := 0
		switch key[0] {
		case 'v':
			var n uint32
			n, rest, ok = takeHead(rest, majorUint)
			ok = ok && n <= 0xff
			v, field = uint8(n), 0
		case 't':
			var s []byte
			s, rest, ok = takeString(rest, majorText)
			ok = ok && len(s) > 0
			typ, field = string(s), 1
		case 'p':
			payload, rest, ok = takeString(rest, majorBytes)
			field = 2
		default:
			return "", 0, nil, false
		}
		if !ok || seen[field] {
			return "", 0, nil, false
		}
		seen[field], b = true, rest
	}
	return typ, v, payload, len(b) == 0
}
