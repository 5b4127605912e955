package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/microsandbox-go/microsandbox/bench/machine"
	"github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend"
)

// quotaRow compares a server that charges a ledger with one that does not, by
// processor time per operation.
type quotaRow struct {
	name string
	must float64
	row  row
}

var quotaRows = []quotaRow{
	{"write 4K without growth", 1.05, row{Depth: 64, load: transfer(fusewire.OpWrite, 4<<10, true)}},
	{"append 4K", 1.25, row{Depth: 8, load: appendTo}},
	{"getattr", 1.02, row{Depth: 64, load: getattr}},
}

// quota measures what a limit costs, and what the limit of another volume does.
func (b *bench) quota(r *report) (err error) {
	bin, err := buildOurs(b.o.dir, true, os.Stderr)
	if err != nil {
		return err
	}
	var servers []*server
	defer func() {
		for _, s := range servers {
			err = errors.Join(err, s.stop())
		}
	}()
	for _, name := range []string{"plain", "counted", "other"} {
		argv := []string{bin, "-socket", "SOCKET", "-dir", b.tree, "-stat-virt", "off"}
		if name != "plain" {
			book := filepath.Join(b.o.dir, name+".ledger")
			if err := newLedger(book); err != nil {
				return err
			}
			argv = append(argv, "-ledger", book)
		}
		s, err := launch("quota-"+name, b.o.dir, argv)
		if err != nil {
			return err
		}
		servers = append(servers, s)
	}
	for _, q := range quotaRows {
		if err := b.compare(r, q, servers[0], servers[1]); err != nil {
			return err
		}
	}
	return b.neighbours(r, servers[0], servers[1], servers[2])
}

// neighbours measures a server that appends while another one does, without a
// ledger and with one of its own.
func (b *bench) neighbours(r *report, plain, counted, other *server) error {
	appends := row{Depth: 8, load: appendTo}
	var beside [2][]float64
	for range b.o.rounds {
		for i, neighbour := range []*server{plain, other} {
			done := make(chan error, 1)
			go func() {
				_, err := b.round(neighbour, appends)
				done <- err
			}()
			got, err := b.round(counted, appends)
			if err := errors.Join(err, <-done); err != nil {
				return err
			}
			beside[i] = append(beside[i], got.cpuPerOp())
		}
	}
	med, best := ratios(beside[0], beside[1], slices.Min[[]float64])
	r.Figures = append(r.Figures, figure{
		Name: "append 4K beside another volume's appends, CPU to beside uncounted ones", Must: "≤ 1.05x",
		Value: fmt.Sprintf("%.2fx (best %.2fx)", med, best), OK: med <= 1.05 || best <= 1.05,
	})
	return nil
}

// compare plays a row on two servers in turn.
func (b *bench) compare(r *report, q quotaRow, one, other *server) error {
	var first, second []float64
	for range b.o.rounds {
		for _, s := range []struct {
			s  *server
			to *[]float64
		}{{one, &first}, {other, &second}} {
			got, err := b.round(s.s, q.row)
			if err != nil {
				return fmt.Errorf("%s on %s: %w", q.name, s.s.name, err)
			}
			*s.to = append(*s.to, got.cpuPerOp())
		}
	}
	med, best := ratios(first, second, slices.Min[[]float64])
	r.Figures = append(r.Figures, figure{
		Name: "with a limit, " + q.name + ", CPU to without", Must: fmt.Sprintf("≤ %.4gx", q.must),
		Value: fmt.Sprintf("%.2fx (best %.2fx; %.2f µs)", med, best, machine.Median(second)), OK: med <= q.must || best <= q.must,
	})
	return nil
}

// newLedger makes a ledger with a limit that is far away.
func newLedger(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(ledger.Format(f, ledger.Limits{Bytes: 1 << 40, Inodes: 1 << 30}, true), f.Close())
}

// appendTo writes 4 KiB at the end of a file of its own, again and again.
func appendTo(s *server, depth int) (program, error) {
	const size = 4 << 10
	dir, err := s.walk("new")
	if err != nil {
		return nil, err
	}
	in := fusewire.CreateIn{Flags: uint32(os.O_RDWR | os.O_CREATE | os.O_TRUNC), Mode: 0o100644}
	reply, err := s.fs.Call(fusewire.OpCreate, dir, fusewire.EntryOutSize+fusewire.OpenOutSize, fusewire.Append(nil, &in), []byte(s.name+"\x00"))
	if err != nil {
		return nil, err
	}
	var e fusewire.EntryOut
	var f fusewire.OpenOut
	rest, _ := fusewire.Decode(reply, &e)
	fusewire.Decode(rest, &f)
	p, err := s.many(depth, func(int) (*frontend.Chain, error) {
		in := fusewire.WriteIn{Fh: f.Fh, Size: size}
		return s.request(fusewire.OpWrite, e.NodeID, fusewire.Append(nil, &in), size, fusewire.Size[fusewire.WriteOut](), 0)
	})
	if err != nil {
		return nil, err
	}
	off := uint64(0)
	p.vary = func(c *frontend.Chain) {
		binary.LittleEndian.PutUint64(c.In[1][8:], off)
		off += size
	}
	p.after = func() error {
		_, err := s.fs.Setattr(e.NodeID, fusewire.SetattrIn{Valid: fusewire.FattrSize})
		return errors.Join(err, s.fs.Release(e.NodeID, f.Fh))
	}
	return p, nil
}
