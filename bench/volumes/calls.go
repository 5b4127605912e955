package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"time"
)

// side plays batches of calls.
type side interface {
	play(op string, n int) (time.Duration, error)
	stop() error
}

// callRows are the rows of calls with their bounds as ratios of the time to the
// peer's. MiB is how much one call moves.
func callRows() []row {
	us := func(name, op string, n int, must, moon float64) row {
		return row{Name: name, op: op, n: n, Unit: "µs", Must: must, Moonshot: moon}
	}
	mibs := func(name, op string, must, moon float64) row {
		return row{Name: name, op: op, n: 1, Unit: "MiB/s", mib: 256, Must: must, Moonshot: moon}
	}
	return []row{
		us("create dir volume (ours durable)", "create", 100, 2.5, 1),
		us("remove empty volume (ours durable)", "remove", 100, 2.5, 1),
		us("create dir volume, 8 at a time", "create 8", 96, 2.5, 1),
		us("get", "get", 500, 0.42, 0.1),
		us("list 1000 volumes", "list", 3, 0.22, 0.045),
		us("fs.read 4 KiB", "read", 1000, 0.16, 0.065),
		us("fs.write 4 KiB over a file (ours atomic, safe)", "overwrite", 300, 1, 0.85),
		us("fs.write 4 KiB new file (ours atomic, safe)", "write new", 200, 0, 0),
		us("fs.stat", "stat", 1000, 0.135, 0.033),
		us("fs.exists", "exists", 1000, 0.15, 0.036),
		us("fs.mkdir", "mkdir", 200, 1, 0),
		us("fs.rename", "rename", 400, 1, 0),
		us("fs.list 10 000 entries", "list 10k", 1, 0.114, 0.057),
		mibs("read stream 256 MiB, own buffer", "read stream", 4.0, 8.0),
		mibs("read stream 256 MiB, chunks of 64 KiB", "read chunks", 1, 0),
		// First of those that write much: many virtual disks are fast until a budget is used up.
		mibs("copy 256 MiB (ours durable)", "copy", 1, 1.28),
		mibs("write stream 256 MiB, 64 KiB chunks (ours durable)", "write stream 64K", 1.71, 2.7),
		mibs("write stream 256 MiB, 1 MiB chunks (ours durable)", "write stream 1M", 1.07, 1.67),
		mibs("read whole 256 MiB", "read whole", 2.7, 6.3),
		mibs("write whole 256 MiB (ours durable)", "write whole", 1, 0),
	}
}

// calls measures the rows of calls, batches of all sides in turns.
func calls(o *options, r *report) (err error) {
	var rows []row
	for _, row := range callRows() {
		if o.rows.MatchString(row.Name) {
			rows = append(rows, row)
		}
	}
	if len(rows) == 0 {
		return nil
	}
	sides, err := startSides(o)
	if err != nil {
		return err
	}
	defer func() {
		for _, s := range sides {
			err = errors.Join(err, s.stop())
		}
	}()
	stop, err := profiled(o)
	if err != nil {
		return err
	}
	defer stop()
	for _, row := range rows {
		if err := measureCalls(o, sides, &row); err != nil {
			return fmt.Errorf("%s: %w", row.Name, err)
		}
		r.add(row)
	}
	return nil
}

// callsAmongMany measures whether creation and removal are as fast in a home
// with many volumes as in one with a thousand.
func callsAmongMany(o *options, r *report) (err error) {
	among := fmt.Sprintf(", among %d", o.many)
	rows := []row{
		{Name: "create dir volume" + among, op: "create", n: 100, Unit: "µs", Must: 2.5, Moonshot: 1},
		{Name: "remove empty volume" + among, op: "remove", n: 100, Unit: "µs", Must: 2.5, Moonshot: 1},
	}
	rows = slices.DeleteFunc(rows, func(r row) bool { return !o.rows.MatchString(r.Name) })
	if len(rows) == 0 {
		return nil
	}
	if err := fillHomes(o); err != nil {
		return err
	}
	p, err := startPeer(o, filepath.Join(o.dir, "many", "peer"))
	if err != nil {
		return err
	}
	s, err := startOurs(filepath.Join(o.dir, "many", "ours"))
	if err != nil {
		return errors.Join(err, p.stop())
	}
	defer func() { err = errors.Join(err, s.stop(), p.stop()) }()
	for _, row := range rows {
		if err := measureCalls(o, []side{p, s}, &row); err != nil {
			return fmt.Errorf("%s: %w", row.Name, err)
		}
		r.add(row)
	}
	return nil
}

func profiled(o *options) (stop func(), err error) {
	if o.profile == "" {
		return func() {}, nil
	}
	f, err := os.Create(o.profile)
	if err != nil {
		return nil, err
	}
	return pprof.StopCPUProfile, pprof.StartCPUProfile(f)
}

// startSides makes a home for each side, with 1000 volumes and one with files.
func startSides(o *options) ([]side, error) {
	for i := range large {
		large[i] = byte(i)
	}
	homes := map[string]string{}
	for _, name := range []string{"ours", "peer", "plain"} {
		homes[name] = filepath.Join(o.dir, "calls", name)
		if err := os.MkdirAll(homes[name], 0o700); err != nil {
			return nil, err
		}
	}
	p, err := startPeer(o, homes["peer"])
	if err != nil {
		return nil, err
	}
	s, err := startOurs(homes["ours"])
	if err != nil {
		return nil, errors.Join(err, p.stop())
	}
	sides := []side{p, s, &plain{homes["plain"]}}
	trees := []string{homes["peer"] + "/volumes/files", homes["ours"] + "/volumes/files", homes["plain"]}
	for i, s := range sides {
		_, err := s.play("setup", 1)
		if i < 2 && err == nil {
			_, err = s.play("fill volumes", 1000)
		}
		if err := errors.Join(err, manyFiles(filepath.Join(trees[i], "listed"), 10000)); err != nil {
			return sides, err
		}
	}
	return sides, nil
}

// manyFiles makes a directory of empty files.
func manyFiles(dir string, n int) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for i := range n {
		f, err := os.Create(filepath.Join(dir, fmt.Sprintf("file-%05d", i)))
		if err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	return nil
}

func measureCalls(o *options, sides []side, row *row) error {
	to := []*[]float64{&row.Peer, &row.Ours, &row.Floor}
	start := time.Now()
	for batch := -1; batch < o.batches && !o.enough(start, batch); batch++ {
		for i, s := range sides {
			if err := before(s, row); err != nil {
				return err
			}
			took, err := s.play(row.op, row.n)
			if errors.Is(err, errNoFloor) {
				continue
			}
			if err != nil {
				return err
			}
			if batch >= 0 { // the first warms up
				*to[i] = append(*to[i], row.value(took))
			}
			if err := after(s, row); err != nil {
				return err
			}
		}
	}
	return nil
}

// before brings a side to where the batch begins, outside of what is timed.
func before(s side, row *row) error {
	runtime.GC()
	if row.mib > 0 {
		flush()
	}
	if row.op == "remove" {
		if _, floor := s.(*plain); !floor {
			_, err := s.play("create", row.n)
			return err
		}
	}
	return nil
}

// after removes what a batch has made.
func after(s side, row *row) error {
	if row.op == "create" || row.op == "create 8" {
		_, err := s.play("remove", 1)
		return err
	}
	return nil
}
