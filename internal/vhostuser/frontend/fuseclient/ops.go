package fuseclient

import (
	"fmt"
	"io"
	"os"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
)

func decodeEntry(b []byte, err error) (e fusewire.EntryOut, _ error) {
	if err != nil {
		return e, err
	}
	if rest, ok := fusewire.Decode(b, &e); !ok || len(rest) != 0 {
		return e, fmt.Errorf("entry of %d bytes", len(b))
	}
	return e, nil
}

func decodeAttr(b []byte, err error) (a fusewire.AttrOut, _ error) {
	if err != nil {
		return a, err
	}
	if rest, ok := fusewire.Decode(b, &a); !ok || len(rest) != 0 {
		return a, fmt.Errorf("attributes of %d bytes", len(b))
	}
	return a, nil
}

func decodeOpen(b []byte, err error) (o fusewire.OpenOut, _ error) {
	if err != nil {
		return o, err
	}
	if rest, ok := fusewire.Decode(b, &o); !ok || len(rest) != 0 {
		return o, fmt.Errorf("open reply of %d bytes", len(b))
	}
	return o, nil
}

// Lookup finds a name in a directory and takes one lookup count.
func (m *Client) Lookup(parent uint64, s string) (fusewire.EntryOut, error) {
	return decodeEntry(m.Call(fusewire.OpLookup, parent, fusewire.EntryOutSize, name(s)))
}

// Forget gives lookup counts back.
func (m *Client) Forget(node, n uint64) error {
	_, err := m.Call(fusewire.OpForget, node, 0, fusewire.Append(nil, &fusewire.ForgetIn{Nlookup: n}))
	return err
}

// Getattr returns the attributes of a node.
func (m *Client) Getattr(node uint64) (fusewire.AttrOut, error) {
	return decodeAttr(m.Call(fusewire.OpGetattr, node, fusewire.AttrOutSize, fusewire.Append(nil, &fusewire.GetattrIn{})))
}

// Setattr changes what in.Valid names.
func (m *Client) Setattr(node uint64, in fusewire.SetattrIn) (fusewire.AttrOut, error) {
	return decodeAttr(m.Call(fusewire.OpSetattr, node, fusewire.AttrOutSize, fusewire.Append(nil, &in)))
}

// Open opens a file with O_* flags.
func (m *Client) Open(node uint64, flags int) (fusewire.OpenOut, error) {
	return decodeOpen(m.Call(fusewire.OpOpen, node, fusewire.OpenOutSize, fusewire.Append(nil, &fusewire.OpenIn{Flags: uint32(flags)})))
}

// Opendir opens a directory.
func (m *Client) Opendir(node uint64) (fusewire.OpenOut, error) {
	return decodeOpen(m.Call(fusewire.OpOpendir, node, fusewire.OpenOutSize,
		fusewire.Append(nil, &fusewire.OpenIn{Flags: uint32(os.O_RDONLY)})))
}

// Release closes a file.
func (m *Client) Release(node, fh uint64) error {
	_, err := m.Call(fusewire.OpRelease, node, 0, fusewire.Append(nil, &fusewire.ReleaseIn{Fh: fh}))
	return err
}

// Releasedir closes a directory.
func (m *Client) Releasedir(node, fh uint64) error {
	_, err := m.Call(fusewire.OpReleasedir, node, 0, fusewire.Append(nil, &fusewire.ReleaseIn{Fh: fh}))
	return err
}

// Create makes and opens a file.
func (m *Client) Create(parent uint64, s string, flags int, mode uint32) (fusewire.EntryOut, fusewire.OpenOut, error) {
	in := fusewire.CreateIn{Flags: uint32(flags), Mode: 0o100000 | mode, Umask: 0o022}
	b, err := m.Call(fusewire.OpCreate, parent, fusewire.EntryOutSize+fusewire.OpenOutSize, fusewire.Append(nil, &in), name(s))
	var o fusewire.OpenOut
	if err == nil && len(b) == fusewire.EntryOutSize+fusewire.OpenOutSize {
		fusewire.Decode(b[fusewire.EntryOutSize:], &o)
		b = b[:fusewire.EntryOutSize]
	}
	e, err := decodeEntry(b, err)
	return e, o, err
}

// Mkdir makes a directory.
func (m *Client) Mkdir(parent uint64, s string, mode uint32) (fusewire.EntryOut, error) {
	return decodeEntry(m.Call(fusewire.OpMkdir, parent, fusewire.EntryOutSize, fusewire.Append(nil, &fusewire.MkdirIn{Mode: mode}), name(s)))
}

// Unlink removes a name.
func (m *Client) Unlink(parent uint64, s string) error {
	_, err := m.Call(fusewire.OpUnlink, parent, 0, name(s))
	return err
}

// Rmdir removes an empty directory.
func (m *Client) Rmdir(parent uint64, s string) error {
	_, err := m.Call(fusewire.OpRmdir, parent, 0, name(s))
	return err
}

// Read reads up to n bytes.
func (m *Client) Read(node, fh, off uint64, n int) ([]byte, error) {
	in := fusewire.ReadIn{Fh: fh, Offset: off, Size: uint32(n)}
	return m.Call(fusewire.OpRead, node, n, fusewire.Append(nil, &in))
}

// Write writes b.
func (m *Client) Write(node, fh, off uint64, b []byte) (int, error) {
	in := fusewire.WriteIn{Fh: fh, Offset: off, Size: uint32(len(b))}
	var out fusewire.WriteOut
	r, err := m.Call(fusewire.OpWrite, node, fusewire.Size[fusewire.WriteOut](), fusewire.Append(nil, &in), b)
	if err != nil {
		return 0, err
	}
	if _, ok := fusewire.Decode(r, &out); !ok {
		return 0, io.ErrUnexpectedEOF
	}
	return int(out.Size), nil
}

// Setxattr sets an extended attribute.
func (m *Client) Setxattr(node uint64, s string, value []byte) error {
	in := fusewire.SetxattrIn{Size: uint32(len(value))}
	_, err := m.Call(fusewire.OpSetxattr, node, 0, fusewire.Append(nil, &in), name(s), value)
	return err
}

// Entry is one name of a listing. Node is set by READDIRPLUS.
type Entry struct {
	fusewire.Dirent
	Name string
	Node fusewire.EntryOut
}

// Readdir reads one block of a listing, of up to n bytes, from off.
func (m *Client) Readdir(node, fh, off uint64, n int, plus bool) ([]Entry, error) {
	op := fusewire.OpReaddir
	if plus {
		op = fusewire.OpReaddirplus
	}
	in := fusewire.ReadIn{Fh: fh, Offset: off, Size: uint32(n)}
	b, err := m.Call(op, node, n, fusewire.Append(nil, &in))
	if err != nil {
		return nil, err
	}
	return Entries(b, plus)
}

// Entries decodes the reply of READDIR or READDIRPLUS.
func Entries(b []byte, plus bool) ([]Entry, error) {
	var list []Entry
	for len(b) > 0 {
		var e Entry
		ok := true
		if plus {
			b, ok = fusewire.Decode(b, &e.Node)
		}
		if ok {
			b, ok = fusewire.Decode(b, &e.Dirent)
		}
		pad := (int(e.Namelen) + 7) &^ 7
		if !ok || pad > len(b) {
			return nil, fmt.Errorf("listing ends in the middle of an entry")
		}
		e.Name = string(b[:e.Namelen])
		b = b[pad:]
		list = append(list, e)
	}
	return list, nil
}
