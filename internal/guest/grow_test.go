package guest

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"testing"
)

// TestGrowSteps: whatever a superblock says, growing asks for larger sizes within
// the device only, and comes to an end.
func TestGrowSteps(t *testing.T) {
	const room = 1 << 24
	for name, s := range map[string]extSize{
		"small blocks": {2048, 1, 8192}, "large blocks": {16384, 0, 32768}, "odd end": {2 * 8192, 1, 8192},
		"nothing": {}, "no groups": {100, 1, 0}, "first beyond the end": {100, math.MaxUint32, 8192},
		"huge": {math.MaxUint64, 1, math.MaxUint32}, "groups of a block": {1 << 23, 0, 1 << 20},
	} {
		steps := 0
		for s.blocks < room {
			next := s.step(room)
			if next > room || next <= s.blocks {
				t.Fatalf("%s: from %d to %d of %d", name, s.blocks, next, room)
			}
			s.blocks = next
			if steps++; steps > room/512 {
				t.Fatalf("%s: no end", name)
			}
		}
	}
	sb := make([]byte, superSize)
	for range 10000 {
		for i := 0; i < len(sb); i += 4 {
			binary.LittleEndian.PutUint32(sb[i:], rand.Uint32()>>rand.UintN(32))
		}
		s, room := sizeOfExt4(sb), rand.Uint64()>>rand.UintN(64)
		if next := s.step(room); s.blocks < room && (next > room || next <= s.blocks) {
			t.Fatalf("%+v: %d of %d", s, next, room)
		}
	}
}
