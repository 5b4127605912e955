package fuseserver

import (
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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

const steadyNames = 2 * hintSlots

// steadyRequests are the requests that a busy guest sends most. Under them
// the server allocates nothing.
// They know more names than there are slots for hints.
func steadyRequests(tb testing.TB, virt string) (*share, map[string]*steady) {
	sh := virtShare(tb, virt)
	fill(tb, sh.dir, steadyNames)
	sh.list(rootID, 128<<10, true) // every node is known from here on
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
		serve := func(name string, r *steady) {
			if used, done := sh.c.serve(r.in, r.out, p); !done || used <= replySize {
				t.Fatalf("%s: used %d, done %v", name, used, done)
			}
		}
		for name, r := range reqs {
			if n := testing.AllocsPerRun(200, func() { serve(name, r) }); n != 0 {
				t.Errorf("%s: %v allocations", name, n)
			}
		}
		names := lookups(steadyNames)
		if n := testing.AllocsPerRun(5, func() {
			for _, r := range names {
				serve("lookup of many", r)
			}
		}); n != 0 {
			t.Errorf("lookup of %d known names: %v allocations", len(names), n)
		}
	})
}

// lookups are LOOKUPs of the files that fill made.
func lookups(n int) []*steady {
	var reqs []*steady
	for i := range n {
		reqs = append(reqs, steadyRequest(w.OpLookup, rootID, w.EntryOutSize, z(entryName(i))))
	}
	return reqs
}

// reportCPU reports the processor time of the process per operation, which a
// busy machine changes less than the time on the wall.
func reportCPU(b *testing.B) func() {
	start := cpuTime(b)
	return func() { b.ReportMetric(float64((cpuTime(b)-start).Nanoseconds())/float64(b.N), "cpu-ns/op") }
}

func cpuTime(b *testing.B) time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

func BenchmarkServe(b *testing.B) {
	for _, virt := range []string{"strict", "off"} {
		sh, reqs := steadyRequests(b, virt)
		names := lookups(steadyNames)
		b.Run(virt+"/lookup-many", func(b *testing.B) {
			p := &parkedRequest{}
			b.ReportAllocs()
			defer reportCPU(b)()
			for i := 0; b.Loop(); i++ {
				r := names[i%len(names)]
				sh.c.serve(r.in, r.out, p)
			}
		})
		for _, name := range []string{"getattr", "lookup", "read", "write"} {
			r := reqs[name]
			b.Run(virt+"/"+name, func(b *testing.B) {
				p := &parkedRequest{}
				b.ReportAllocs()
				defer reportCPU(b)()
				for b.Loop() {
					sh.c.serve(r.in, r.out, p)
				}
			})
		}
	}
}

// BenchmarkListing lists 10 000 entries; its floor is getdents64 alone.
func BenchmarkListing(b *testing.B) {
	for _, virt := range []string{"strict", "off"} {
		b.Run(virt, func(b *testing.B) {
			sh := virtShare(b, virt)
			fill(b, sh.dir, 10_000)
			sh.list(rootID, 128<<10, true) // every node is known from here on
			fh, err := sh.opendir(rootID)
			sh.must(err)
			for name, op := range map[string]w.Opcode{"readdir": w.OpReaddir, "readdirplus": w.OpReaddirplus} {
				for _, size := range []int{4 << 10, 128 << 10} {
					b.Run(fmt.Sprintf("%s/%dK", name, size>>10), func(b *testing.B) {
						defer reportCPU(b)()
						for b.Loop() {
							sh.scan(op, fh, size)
						}
					})
				}
			}
			b.Run("floor", func(b *testing.B) { listHost(b, sh.dir) })
		})
	}
}

func listHost(b *testing.B, path string) {
	dir, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(dir)
	buf := make([]byte, blockSize)
	for b.Loop() {
		if _, err := unix.Seek(dir, 0, 0); err != nil {
			b.Fatal(err)
		}
		for {
			if n, err := getdents(dir, buf); err != 0 || n == 0 {
				break
			}
		}
	}
}

// scan lists the root once, decoding only what says where to go on.
func (cl *client) scan(op w.Opcode, fh uint64, size int) {
	p := &parkedRequest{}
	for off := uint64(0); ; {
		r := steadyRequest(op, rootID, size, pack(w.ReadIn{Fh: fh, Offset: off, Size: uint32(size)}, w.Append))
		used, _ := cl.c.serve(r.in, r.out, p)
		if used <= replySize {
			return
		}
		for b := r.out[1][:used-replySize]; len(b) > 0; {
			if op == w.OpReaddirplus {
				b = b[w.EntryOutSize:]
			}
			var d w.Dirent
			w.Decode(b, &d)
			off = d.Off
			b = b[w.DirentLen(int(d.Namelen)):]
		}
	}
}

// BenchmarkNewNodes looks names up for the first time and forgets them.
func BenchmarkNewNodes(b *testing.B) {
	for _, virt := range []string{"strict", "off"} {
		sh := virtShare(b, virt)
		fill(b, sh.dir, 1000)
		b.Run(virt, func(b *testing.B) {
			b.ReportAllocs()
			p := &parkedRequest{}
			reqs := lookups(1000)
			forget := steadyRequest(w.OpForget, 0, 0, pack(w.ForgetIn{Nlookup: 1}, w.Append))
			defer reportCPU(b)()
			for i := 0; b.Loop(); i++ {
				r := reqs[i%len(reqs)]
				sh.c.serve(r.in, r.out, p)
				copy(forget.in[0][16:24], r.out[1][:8])
				sh.c.serve(forget.in, nil, p)
			}
		})
	}
}
