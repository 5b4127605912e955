package guest

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"strings"
)

// probeSize covers the superblocks below; btrfs' is the last, at 64 KiB.
const probeSize = 0x10000 + 0x1000

// fstypesOf returns the types to try on a device: the one its superblock names,
// else every block file system the kernel knows.
func fstypesOf(dev string) ([]string, error) {
	f, err := os.Open(dev)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, probeSize)
	n, err := io.ReadFull(f, b)
	if err != nil && err != io.ErrUnexpectedEOF && err != io.EOF {
		return nil, err
	}
	if t := superblockType(b[:n]); t != "" {
		return []string{t}, nil
	}
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return nil, err
	}
	return blockTypes(string(known)), nil
}

// blockTypes takes the types that need a device from /proc/filesystems.
func blockTypes(text string) []string {
	var out []string
	for _, line := range strings.Split(text, "\n") {
		if nodev, t, ok := strings.Cut(line, "\t"); ok && nodev == "" && t != "" {
			out = append(out, t)
		}
	}
	return out
}

// superblockType names the file system by its signature, "" if none is known.
// b is the beginning of the device, at most probeSize bytes.
func superblockType(b []byte) string {
	at := func(off int, sig string) bool {
		return off+len(sig) <= len(b) && string(b[off:off+len(sig)]) == sig
	}
	switch {
	case at(0, "XFSB"):
		return "xfs"
	case at(0, "hsqs"):
		return "squashfs"
	case at(0x10040, "_BHRfS_M"):
		return "btrfs"
	case at(1024, "\xe2\xe1\xf5\xe0"):
		return "erofs"
	case at(1024+56, "\x53\xef"):
		return extType(b)
	case at(0x8001, "CD001"):
		return "iso9660"
	case isFAT(b):
		return "vfat"
	}
	return ""
}

// extType tells ext2, ext3 and ext4 apart by features, as libblkid does.
func extType(b []byte) string {
	if len(b) < 1024+0x6c {
		return ""
	}
	sb := b[1024:]
	compat, incompat, ro := le32(sb, 0x5c), le32(sb, 0x60), le32(sb, 0x64)
	const (
		hasJournal   = 0x4              // compat
		ext3Incompat = 0x2 | 0x4 | 0x10 // filetype, recover, meta_bg
		ext3Ro       = 0x1 | 0x2 | 0x4  // sparse_super, large_file, btree_dir
	)
	switch {
	case incompat&^ext3Incompat != 0 || ro&^ext3Ro != 0:
		return "ext4"
	case compat&hasJournal != 0:
		return "ext3"
	}
	return "ext2"
}

func le32(b []byte, off int) uint32 { return binary.LittleEndian.Uint32(b[off:]) }

// isFAT looks for a boot sector whose fields make sense and a FAT label.
func isFAT(b []byte) bool {
	if len(b) < 512 || b[510] != 0x55 || b[511] != 0xaa {
		return false
	}
	sector := binary.LittleEndian.Uint16(b[11:])
	cluster := b[13]
	if sector < 512 || sector > 4096 || sector&(sector-1) != 0 || cluster == 0 || cluster&(cluster-1) != 0 {
		return false
	}
	return bytes.HasPrefix(b[54:], []byte("FAT1")) || bytes.HasPrefix(b[82:], []byte("FAT32"))
}
