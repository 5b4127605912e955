package agentproto

import (
	"encoding/binary"
	"slices"
)

// The messages of every boot and of every first program are read and written by
// hand too. An emulated guest pays most for code that runs once, and each
// direction of the library costs it 10 ms. What is written are the library's
// bytes; what is read in any but the usual form is left to the library.

// compact is a payload that writes itself.
type compact interface{ appendCBOR(b []byte) []byte }

const (
	majorNegative = 1
	majorArray    = 4
	majorMap      = 5
)

func appendText(b []byte, s string) []byte { return append(appendHead(b, majorText, len(s)), s...) }

// appendUint appends a key of a map and a number.
func appendUint(b []byte, key string, v uint64) []byte {
	b = appendText(b, key)
	if v>>32 == 0 {
		return appendHead(b, majorUint, int(v))
	}
	return binary.BigEndian.AppendUint64(append(b, majorUint<<5|27), v)
}

func (h Hello) appendCBOR(b []byte) []byte {
	fields := 2
	if len(h.Modules) > 0 {
		fields++
	}
	b = appendHead(b, majorMap, fields)
	b = appendText(appendText(b, "version"), h.Version)
	b = appendUint(b, "boot_ns", h.BootNS)
	if len(h.Modules) == 0 {
		return b
	}
	b = appendHead(appendText(b, "modules"), majorArray, len(h.Modules))
	for _, m := range h.Modules {
		b = appendText(b, m)
	}
	return b
}

func (r Ready) appendCBOR(b []byte) []byte {
	b = appendHead(b, majorMap, 4)
	b = appendUint(b, "boot_time_ns", r.BootTimeNS)
	b = appendUint(b, "init_time_ns", r.InitTimeNS)
	b = appendUint(b, "ready_time_ns", r.ReadyTimeNS)
	return appendText(appendText(b, "agent_version"), r.AgentVersion)
}

func (s Started) appendCBOR(b []byte) []byte {
	return appendUint(appendHead(b, majorMap, 1), "pid", uint64(s.PID))
}

func (e Exited) appendCBOR(b []byte) []byte {
	b = appendHead(b, majorMap, 1)
	if e.Code < 0 {
		return appendHead(appendText(b, "code"), majorNegative, int(-(e.Code + 1)))
	}
	return appendUint(b, "code", uint64(e.Code))
}

// cursor reads items one after the other. The first one that is not of the
// usual form sets bad; what is returned from then on means nothing.
type cursor struct {
	b   []byte
	bad bool
}

// takeAll reads a whole payload of the usual form; v is not changed otherwise.
func takeAll[T any, P interface {
	*T
	take(*cursor)
}](payload []byte, v P) bool {
	var read T
	c := cursor{b: payload}
	P(&read).take(&c)
	if c.bad || len(c.b) != 0 {
		return false
	}
	*v = read
	return true
}

func (c *cursor) fail() { c.bad, c.b = true, nil }

// next reports whether the next item is the simple value v, and takes it then.
func (c *cursor) next(v byte) bool {
	if len(c.b) == 0 || c.b[0] != v {
		return false
	}
	c.b = c.b[1:]
	return true
}

func (c *cursor) head(major byte) int {
	n, rest, ok := takeHead(c.b, major)
	if !ok {
		c.fail()
		return 0
	}
	c.b = rest
	return int(n)
}

func (c *cursor) uint() uint64 {
	const eight = majorUint<<5 | 27
	if len(c.b) > 8 && c.b[0] == eight {
		v := binary.BigEndian.Uint64(c.b[1:])
		c.b = c.b[9:]
		return v
	}
	return uint64(c.head(majorUint))
}

// int takes a number that is not negative.
func (c *cursor) int() int64 {
	v := c.uint()
	if v>>63 != 0 {
		c.fail()
	}
	return int64(v)
}

func (c *cursor) uint16() uint16 {
	v := c.uint()
	if v>>16 != 0 {
		c.fail()
	}
	return uint16(v)
}

func (c *cursor) bool() bool {
	if c.next(0xf5) {
		return true
	}
	if !c.next(0xf4) {
		c.fail()
	}
	return false
}

func (c *cursor) string(major byte) []byte {
	s, rest, ok := takeString(c.b, major)
	if !ok {
		c.fail()
		return nil
	}
	c.b = rest
	return s
}

func (c *cursor) text() string { return string(c.string(majorText)) }

// optional takes null, or what take takes.
func optional[T any](c *cursor, take func() T) *T {
	if c.next(0xf6) {
		return nil
	}
	v := take()
	return &v
}

// list takes an array.
func list[T any](c *cursor, take func() T) []T {
	n := c.head(majorArray)
	if n > len(c.b) || n > MaxElements { // an item has at least a byte
		c.fail()
		return nil
	}
	out := make([]T, 0, n)
	for range n {
		if out = append(out, take()); c.bad {
			return nil
		}
	}
	return out
}

// fields takes a map whose keys are among names, each at most once, and calls
// take with the index of a key to read its value.
func (c *cursor) fields(names []string, take func(field int)) {
	var seen uint32
	for range c.head(majorMap) {
		field := slices.Index(names, string(c.string(majorText)))
		if c.bad || field < 0 || seen&(1<<field) != 0 {
			c.fail()
			return
		}
		seen |= 1 << field
		take(field)
	}
}

var bootFields = []string{"hostname", "root", "mounts", "env", "workdir", "user", "time_ns", "entropy"}

func (m *Boot) take(c *cursor) {
	c.fields(bootFields, func(field int) {
		switch field {
		case 0:
			m.Hostname = c.text()
		case 1:
			m.Root.take(c)
		case 2:
			m.Mounts = list(c, func() (v Mount) { v.take(c); return v })
		case 3:
			m.Env = list(c, c.text)
		case 4:
			m.Workdir = c.text()
		case 5:
			m.User = c.text()
		case 6:
			m.TimeNS = c.int()
		case 7:
			m.Entropy = slices.Clone(c.string(majorBytes))
		}
	})
}

var rootFields = []string{"lower", "upper", "fstype"}

func (m *Root) take(c *cursor) {
	c.fields(rootFields, func(field int) {
		*[]*string{&m.Lower, &m.Upper, &m.Fstype}[field] = c.text()
	})
}

var mountFields = []string{"kind", "guest", "source", "fstype", "size", "readonly", "noexec", "nosuid", "nodev", "grow"}

func (m *Mount) take(c *cursor) {
	c.fields(mountFields, func(field int) {
		switch {
		case field < 4:
			*[]*string{&m.Kind, &m.Guest, &m.Source, &m.Fstype}[field] = c.text()
		case field == 4:
			m.Size = c.int()
		default:
			*[]*bool{&m.Readonly, &m.Noexec, &m.Nosuid, &m.Nodev, &m.Grow}[field-5] = c.bool()
		}
	})
}

var execFields = []string{"cmd", "args", "env", "cwd", "user", "tty", "rows", "cols", "rlimits", "stdin"}

func (m *Exec) take(c *cursor) {
	c.fields(execFields, func(field int) {
		switch field {
		case 0:
			m.Cmd = c.text()
		case 1:
			m.Args = list(c, c.text)
		case 2:
			m.Env = list(c, c.text)
		case 3:
			m.Cwd = optional(c, c.text)
		case 4:
			m.User = optional(c, c.text)
		case 5:
			m.TTY = c.bool()
		case 6:
			m.Rows = c.uint16()
		case 7:
			m.Cols = c.uint16()
		case 8:
			m.Rlimits = list(c, func() (v Rlimit) { v.take(c); return v })
		case 9:
			m.Stdin = optional(c, c.bool)
		}
	})
}

var rlimitFields = []string{"resource", "soft", "hard"}

func (m *Rlimit) take(c *cursor) {
	c.fields(rlimitFields, func(field int) {
		switch field {
		case 0:
			m.Resource = c.text()
		case 1:
			m.Soft = c.uint()
		case 2:
			m.Hard = c.uint()
		}
	})
}
