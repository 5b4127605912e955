package mount

import (
	"crypto/sha256"
	"encoding/hex"
	"strconv"
	"strings"
)

// The machine has 24 virtio-mmio slots. Some are taken by every sandbox: the
// agent's serial port, the balloon, the random source, the root image, the
// writable layer and a network card. Each bind, named or disk mount needs one.
const (
	machineSlots = 24
	fixedSlots   = 6

	// MaxDevices is how many bind, named and disk mounts one sandbox can have.
	MaxDevices = machineSlots - fixedSlots
)

// maxTag is the length of a virtio-blk serial in bytes; virtiofs tags could
// have 36.
const maxTag = 20

// tagger hands out the names by which the guest finds shares and disks. They
// depend on the guest path alone, so that a restart finds the same ones, and
// are unique within one sandbox.
type tagger map[string]bool

// tag returns at most maxTag bytes of [0-9A-Za-z._-]: the begin of the guest
// path, readable in the guest's /proc/mounts, and a hash of it. Slugs never
// equal the fixed serials of the root disks, which contain no underscore.
func (t tagger) tag(guest string) string {
	sum := sha256.Sum256([]byte(guest))
	hash := hex.EncodeToString(sum[:4])
	slug := strings.Map(slugRune, strings.TrimLeft(guest, "/"))
	slug = slug[:min(len(slug), maxTag-1-len(hash))]
	tag := slug + "_" + hash
	// Two guest paths with the same begin and hash can be made on purpose.
	for n := 1; t[tag]; n++ {
		tail := "_" + strconv.Itoa(n)
		tag = slug[:min(len(slug), maxTag-1-len(hash)-len(tail))] + "_" + hash + tail
	}
	t[tag] = true
	return tag
}

func slugRune(r rune) rune {
	switch {
	case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '.', r == '-':
		return r
	}
	return '_'
}
