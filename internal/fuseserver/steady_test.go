package fuseserver

import (
	"testing"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
)

// steady is a request that is sent again and again from the same memory.
type steady struct{ in, out [][]byte }

func steadyRequest(op w.Opcode, node uint64, room int, parts ...[]byte) *steady {
	h := w.InHeader{Opcode: op, Unique: 1, NodeID: node, Len: uint32(headerSize + length(parts))}
	s := &steady{in: append([][]byte{w.Append(nil, &h)}, parts...), out: [][]byte{make([]byte, replySize)}}
	if room > 0 {
		s.out = append(s.out, make([]byte, room))
	}
	return s
}

// steadyRequests are the requests that a busy guest sends most. Under them
// the server allocates nothing.
func steadyRequests(tb testing.TB, virt string) (*share, map[string]*steady) {
	sh := virtShare(tb, virt)
	e, fh := sh.mustCreate(rootID, "file", 0o644)
	if _, err := sh.write(e.NodeID, fh, 0, string(make([]byte, 64<<10))); err != 0 {
		tb.Fatal(err)
	}
	return sh, map[string]*steady{
		"getattr": steadyRequest(w.OpGetattr, e.NodeID, w.AttrOutSize, pack(w.GetattrIn{}, w.Append)),
		"lookup":  steadyRequest(w.OpLookup, rootID, w.EntryOutSize, z("file")),
		"read":    steadyRequest(w.OpRead, e.NodeID, 4096, pack(w.ReadIn{Fh: fh, Offset: 4096, Size: 4096}, w.Append)),
		"write":   steadyRequest(w.OpWrite, e.NodeID, 8, pack(w.WriteIn{Fh: fh, Offset: 4096, Size: 4096}, w.Append), make([]byte, 4096)),
	}
}

func TestSteadyStateAllocatesNothing(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		sh, reqs := steadyRequests(t, virt)
		p := &parkedRequest{}
		for name, r := range reqs {
			n := testing.AllocsPerRun(200, func() {
				if used, done := sh.c.serve(r.in, r.out, p); !done || used <= replySize {
					t.Fatalf("%s: used %d, done %v", name, used, done)
				}
			})
			if n != 0 {
				t.Errorf("%s: %v allocations", name, n)
			}
		}
	})
}

func BenchmarkServe(b *testing.B) {
	for _, virt := range []string{"strict", "off"} {
		sh, reqs := steadyRequests(b, virt)
		for _, name := range []string{"getattr", "lookup", "read", "write"} {
			r := reqs[name]
			b.Run(virt+"/"+name, func(b *testing.B) {
				p := &parkedRequest{}
				b.ReportAllocs()
				for b.Loop() {
					sh.c.serve(r.in, r.out, p)
				}
			})
		}
	}
}
