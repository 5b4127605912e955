package fileserver

import (
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/confine"
	"github.com/microsandbox-go/microsandbox/internal/fusewire"
)

// BenchmarkStart is the time from Start to a server that serves and its end.
func BenchmarkStart(b *testing.B) {
	s := share(b, "a")
	for b.Loop() {
		p := mustStart(b, Options{Shares: []Share{s}})
		p.hangUp()
		<-p.Done()
	}
}

// BenchmarkFilter is what the system call filter costs a request that is one
// system call.
func BenchmarkFilter(b *testing.B) {
	for name, without := range map[string][]confine.Measure{"filter": nil, "none": {confine.Seccomp}} {
		b.Run(name, func(b *testing.B) {
			g := mustStart(b, Options{Shares: []Share{share(b, "a")}, Without: without}).guest(b, 0)
			in := fusewire.GetattrIn{}
			body := fusewire.Append(nil, &in)
			for b.Loop() {
				if _, errno := g.call(fusewire.OpGetattr, fusewire.RootID, body, fusewire.Size[fusewire.AttrOut]()); errno != 0 {
					b.Fatal(errno)
				}
			}
		})
	}
}
