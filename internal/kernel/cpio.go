package kernel

import (
	"fmt"
	"io"
)

// File types of an archive entry, as in st_mode.
const (
	modeDir  = 0o040000
	modeFile = 0o100000
	modeChar = 0o020000
)

// entry is one file of an initramfs.
type entry struct {
	name         string
	mode         uint32 // type and permissions
	major, minor uint32 // of a device
	data         []byte
}

// writeCPIO writes a newc archive (Linux Documentation/driver-api/early-userspace/
// buffer-format.rst) of the entries and its trailer. Parents come before children
// in entries: the kernel does not make them.
func writeCPIO(w io.Writer, entries []entry) error {
	c := &cpioWriter{w: w}
	for i, e := range entries {
		c.entry(uint32(i+1), e)
	}
	c.entry(0, entry{name: "TRAILER!!!"})
	return c.err
}

type cpioWriter struct {
	w   io.Writer
	n   int
	err error
}

func (c *cpioWriter) write(b []byte) {
	if c.err == nil {
		_, c.err = c.w.Write(b)
	}
	c.n += len(b)
}

// pad fills up to the next multiple of four bytes.
func (c *cpioWriter) pad() { c.write(make([]byte, -c.n&3)) }

func (c *cpioWriter) entry(ino uint32, e entry) {
	nlink := uint32(1)
	if e.mode&modeDir != 0 {
		nlink = 2
	}
	head := "070701"
	for _, v := range []uint32{
		ino, e.mode, 0 /*uid*/, 0 /*gid*/, nlink, 0 /*mtime*/, uint32(len(e.data)),
		0, 0 /*device of the file*/, e.major, e.minor, uint32(len(e.name) + 1), 0, /*checksum*/
	} {
		head += fmt.Sprintf("%08x", v)
	}
	c.write([]byte(head + e.name + "\x00"))
	c.pad()
	c.write(e.data)
	c.pad()
}
